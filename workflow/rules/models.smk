# Models to start from: trained from scratch (the demo), or moved to another tokenizer.


rule pretrain:
    input:
        unpack(inputs_of("models/{model}/manifest.json")),
    output:
        manifest="<root>/models/{model}/manifest.json",
        weights="<root>/models/{model}/model.safetensors",
        metrics="<root>/models/{model}/metrics.jsonl",
    log:
        "<root>/logs/pretrain/{model}.log",
    conda:
        CONDA
    threads: resource("pretrain", "threads")
    resources:
        mem_mb=resource("pretrain", "mem_mb"),
        runtime=resource("pretrain", "runtime"),
        gpu=resource("pretrain", "gpu"),
        launcher=launcher("pretrain"),
    params:
        **part_of_plan("models/{model}/manifest.json"),
    shell:
        "{resources.launcher} stages.pretrain --root {params.root} --manifest models/{wildcards.model}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule initialize:
    input:
        unpack(inputs_of("initialized/{model}/{tokenizer}/{variant}/manifest.json")),
    output:
        manifest="<root>/initialized/{model}/{tokenizer}/{variant}/manifest.json",
        weights="<root>/initialized/{model}/{tokenizer}/{variant}/model.safetensors",
        provenance="<root>/initialized/{model}/{tokenizer}/{variant}/provenance.parquet",
    log:
        "<root>/logs/initialize/{model}/{tokenizer}/{variant}.log",
    conda:
        CONDA
    threads: resource("initialize", "threads")
    resources:
        mem_mb=resource("initialize", "mem_mb"),
        runtime=resource("initialize", "runtime"),
    params:
        **part_of_plan("initialized/{model}/{tokenizer}/{variant}/manifest.json"),
    shell:
        "python -m stages.initialize --root {params.root} --manifest initialized/{wildcards.model}/{wildcards.tokenizer}/{wildcards.variant}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"
