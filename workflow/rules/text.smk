# Text: corpora, and evaluation tasks made from them.


rule corpus:
    input:
        unpack(inputs_of("corpora/{corpus}/manifest.json")),
    output:
        manifest=ROOT + "/corpora/{corpus}/manifest.json",
        train=ROOT + "/corpora/{corpus}/train.parquet",
        heldout=ROOT + "/corpora/{corpus}/heldout.parquet",
    log:
        ROOT + "/logs/corpus/{corpus}.log",
    conda:
        CONDA
    threads: resource("corpus", "threads")
    resources:
        mem_mb=resource("corpus", "mem_mb"),
        runtime=resource("corpus", "runtime"),
    params:
        **part_of_plan("corpora/{corpus}/manifest.json"),
    shell:
        "{PYTHON} -m stages.corpus --root {ROOT} --manifest corpora/{wildcards.corpus}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule cloze_task:
    input:
        unpack(inputs_of("tasks/{task}/manifest.json")),
    output:
        manifest=ROOT + "/tasks/{task}/manifest.json",
        questions=ROOT + "/tasks/{task}/items.jsonl",
    log:
        ROOT + "/logs/cloze_task/{task}.log",
    conda:
        CONDA
    threads: resource("cloze_task", "threads")
    resources:
        mem_mb=resource("cloze_task", "mem_mb"),
        runtime=resource("cloze_task", "runtime"),
    params:
        **part_of_plan("tasks/{task}/manifest.json"),
    shell:
        "{PYTHON} -m stages.cloze_task --root {ROOT} --manifest tasks/{wildcards.task}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"
