# Evaluations, and the report on all of them.


rule evaluate:
    input:
        unpack(inputs_of("evaluations/{model}/{suite}/manifest.json")),
    output:
        manifest=ROOT + "/evaluations/{model}/{suite}/manifest.json",
        results=ROOT + "/evaluations/{model}/{suite}/results.json",
        samples=ROOT + "/evaluations/{model}/{suite}/samples.parquet",
    log:
        ROOT + "/logs/evaluate/{model}/{suite}.log",
    conda:
        CONDA
    threads: resource("evaluate", "threads")
    resources:
        mem_mb=resource("evaluate", "mem_mb"),
        runtime=resource("evaluate", "runtime"),
        gpu=resource("evaluate", "gpu"),
    params:
        **part_of_plan("evaluations/{model}/{suite}/manifest.json"),
    shell:
        "{PYTHON} -m stages.evaluate --root {ROOT} --manifest evaluations/{wildcards.model}/{wildcards.suite}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule summarize:
    input:
        unpack(inputs_of("summary/manifest.json")),
    output:
        manifest=ROOT + "/summary/manifest.json",
        summary=ROOT + "/summary/summary.parquet",
    log:
        ROOT + "/logs/summarize.log",
    localrule: True
    conda:
        CONDA
    threads: resource("summarize", "threads")
    resources:
        mem_mb=resource("summarize", "mem_mb"),
        runtime=resource("summarize", "runtime"),
    params:
        **part_of_plan("summary/manifest.json"),
    shell:
        "{PYTHON} -m stages.summarize --root {ROOT} --manifest summary/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule report:
    input:
        unpack(inputs_of("report.manifest.json")),
    output:
        manifest=ROOT + "/report.manifest.json",
        report=ROOT + "/report.html",
    log:
        ROOT + "/logs/report.log",
    localrule: True
    conda:
        CONDA
    threads: resource("report", "threads")
    resources:
        mem_mb=resource("report", "mem_mb"),
        runtime=resource("report", "runtime"),
    params:
        **part_of_plan("report.manifest.json"),
    shell:
        "{PYTHON} -m stages.report --root {ROOT} --manifest report.manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"
