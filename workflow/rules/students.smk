# Students: trained from their initialisation with the losses of their experiment.


rule distill:
    input:
        unpack(inputs_of("students/{experiment}/manifest.json")),
    output:
        manifest=ROOT + "/students/{experiment}/manifest.json",
        weights=ROOT + "/students/{experiment}/model.safetensors",
        metrics=ROOT + "/students/{experiment}/metrics.jsonl",
    log:
        ROOT + "/logs/distill/{experiment}.log",
    conda:
        CONDA
    threads: resource("distill", "threads")
    resources:
        mem_mb=resource("distill", "mem_mb"),
        runtime=resource("distill", "runtime"),
        gpu=resource("distill", "gpu"),
    params:
        **part_of_plan("students/{experiment}/manifest.json"),
    shell:
        "{ACCELERATE[distill]}stages.distill --root {ROOT} --manifest students/{wildcards.experiment}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"
