# Models to start from: trained from scratch (the demo), or moved to another tokenizer.


rule pretrain:
    input:
        unpack(inputs_of("models/{model}/manifest.json")),
    output:
        manifest=ROOT + "/models/{model}/manifest.json",
        weights=ROOT + "/models/{model}/model.safetensors",
        metrics=ROOT + "/models/{model}/metrics.jsonl",
    log:
        ROOT + "/logs/pretrain/{model}.log",
    conda:
        CONDA
    threads: resource("pretrain", "threads")
    resources:
        mem_mb=resource("pretrain", "mem_mb"),
        runtime=resource("pretrain", "runtime"),
        gpu=resource("pretrain", "gpu"),
    params:
        **part_of_plan("models/{model}/manifest.json"),
    shell:
        "{ACCELERATE[pretrain]}stages.pretrain --root {ROOT} --manifest models/{wildcards.model}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule initialize:
    input:
        unpack(inputs_of("initialized/{model}/{tokenizer}/{variant}/manifest.json")),
    output:
        manifest=ROOT + "/initialized/{model}/{tokenizer}/{variant}/manifest.json",
        weights=ROOT + "/initialized/{model}/{tokenizer}/{variant}/model.safetensors",
        provenance=ROOT
        + "/initialized/{model}/{tokenizer}/{variant}/provenance.parquet",
    log:
        ROOT + "/logs/initialize/{model}/{tokenizer}/{variant}.log",
    conda:
        CONDA
    threads: resource("initialize", "threads")
    resources:
        mem_mb=resource("initialize", "mem_mb"),
        runtime=resource("initialize", "runtime"),
    params:
        **part_of_plan("initialized/{model}/{tokenizer}/{variant}/manifest.json"),
    shell:
        "{PYTHON} -m stages.initialize --root {ROOT} --manifest initialized/{wildcards.model}/{wildcards.tokenizer}/{wildcards.variant}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"
