# Teacher signals: one job for each shard, joined by an index; and the teacher's matrices, once.


rule teacher_signals:
    input:
        unpack(inputs_of("teachers/{teacher}/{corpus}/part-{shard}.manifest.json")),
    output:
        manifest="<root>/teachers/{teacher}/{corpus}/part-{shard}.manifest.json",
        signals="<root>/teachers/{teacher}/{corpus}/part-{shard}.parquet",
    log:
        "<root>/logs/teacher_signals/{teacher}/{corpus}/{shard}.log",
    conda:
        CONDA
    threads: resource("teacher_signals", "threads")
    resources:
        mem_mb=resource("teacher_signals", "mem_mb"),
        runtime=resource("teacher_signals", "runtime"),
        gpu=resource("teacher_signals", "gpu"),
    params:
        **part_of_plan("teachers/{teacher}/{corpus}/part-{shard}.manifest.json"),
    shell:
        "python -m stages.teacher_signals --root {params.root} --manifest teachers/{wildcards.teacher}/{wildcards.corpus}/part-{wildcards.shard}.manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule teacher_index:
    input:
        unpack(inputs_of("teachers/{teacher}/{corpus}/manifest.json")),
    output:
        manifest="<root>/teachers/{teacher}/{corpus}/manifest.json",
        shards="<root>/teachers/{teacher}/{corpus}/shards.json",
    log:
        "<root>/logs/teacher_index/{teacher}/{corpus}.log",
    localrule: True
    conda:
        CONDA
    threads: resource("teacher_index", "threads")
    resources:
        mem_mb=resource("teacher_index", "mem_mb"),
        runtime=resource("teacher_index", "runtime"),
    params:
        **part_of_plan("teachers/{teacher}/{corpus}/manifest.json"),
    shell:
        "python -m stages.teacher_index --root {params.root} --manifest teachers/{wildcards.teacher}/{wildcards.corpus}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule teacher_head:
    input:
        unpack(inputs_of("teachers/{teacher}/head.manifest.json")),
    output:
        manifest="<root>/teachers/{teacher}/head.manifest.json",
        matrices="<root>/teachers/{teacher}/head.safetensors",
    log:
        "<root>/logs/teacher_head/{teacher}.log",
    conda:
        CONDA
    threads: resource("teacher_head", "threads")
    resources:
        mem_mb=resource("teacher_head", "mem_mb"),
        runtime=resource("teacher_head", "runtime"),
    params:
        **part_of_plan("teachers/{teacher}/head.manifest.json"),
    shell:
        "python -m stages.teacher_head --root {params.root} --manifest teachers/{wildcards.teacher}/head.manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"
