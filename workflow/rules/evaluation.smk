# Evaluations, and the report on all of them.


rule evaluate:
    input:
        unpack(inputs_of("evaluations/{model}/{suite}/manifest.json")),
    output:
        manifest="<root>/evaluations/{model}/{suite}/manifest.json",
        results="<root>/evaluations/{model}/{suite}/results.json",
        samples="<root>/evaluations/{model}/{suite}/samples.parquet",
    log:
        "<root>/logs/evaluate/{model}/{suite}.log",
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
        "python -m stages.evaluate --root {params.root} --manifest evaluations/{wildcards.model}/{wildcards.suite}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule summarize:
    input:
        unpack(inputs_of("summary/manifest.json")),
    output:
        manifest="<root>/summary/manifest.json",
        summary="<root>/summary/summary.parquet",
        comparisons="<root>/summary/comparisons.parquet",
    log:
        "<root>/logs/summarize.log",
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
        "python -m stages.summarize --root {params.root} --manifest summary/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule report:
    input:
        unpack(inputs_of("report.manifest.json")),
    output:
        manifest="<root>/report.manifest.json",
        report="<root>/report.html",
    log:
        "<root>/logs/report.log",
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
        "python -m stages.report --root {params.root} --manifest report.manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"
