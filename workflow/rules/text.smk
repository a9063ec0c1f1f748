# Text: corpora, read or written by a teacher, and evaluation tasks made from them.


# Both make corpora; `generated` is a name of one that a teacher writes.
ruleorder: generate > corpus


rule corpus:
    input:
        unpack(inputs_of("corpora/{corpus}/manifest.json")),
    output:
        manifest="<root>/corpora/{corpus}/manifest.json",
        train="<root>/corpora/{corpus}/train.parquet",
        heldout="<root>/corpora/{corpus}/heldout.parquet",
    log:
        "<root>/logs/corpus/{corpus}.log",
    conda:
        CONDA
    threads: resource("corpus", "threads")
    resources:
        mem_mb=resource("corpus", "mem_mb"),
        runtime=resource("corpus", "runtime"),
    params:
        **part_of_plan("corpora/{corpus}/manifest.json"),
    shell:
        "python -m stages.corpus --root {params.root} --manifest corpora/{wildcards.corpus}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule generate:
    input:
        unpack(inputs_of("corpora/{generated}/manifest.json")),
    output:
        manifest="<root>/corpora/{generated}/manifest.json",
        train="<root>/corpora/{generated}/train.parquet",
        heldout="<root>/corpora/{generated}/heldout.parquet",
        generations="<root>/corpora/{generated}/generations.parquet",
    log:
        "<root>/logs/generate/{generated}.log",
    conda:
        CONDA
    threads: resource("generate", "threads")
    resources:
        mem_mb=resource("generate", "mem_mb"),
        runtime=resource("generate", "runtime"),
        gpu=resource("generate", "gpu"),
    params:
        **part_of_plan("corpora/{generated}/manifest.json"),
    shell:
        "python -m stages.generate --root {params.root} --manifest corpora/{wildcards.generated}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule cloze_task:
    input:
        unpack(inputs_of("tasks/{task}/manifest.json")),
    output:
        manifest="<root>/tasks/{task}/manifest.json",
        questions="<root>/tasks/{task}/items.jsonl",
    log:
        "<root>/logs/cloze_task/{task}.log",
    conda:
        CONDA
    threads: resource("cloze_task", "threads")
    resources:
        mem_mb=resource("cloze_task", "mem_mb"),
        runtime=resource("cloze_task", "runtime"),
    params:
        **part_of_plan("tasks/{task}/manifest.json"),
    shell:
        "python -m stages.cloze_task --root {params.root} --manifest tasks/{wildcards.task}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"
