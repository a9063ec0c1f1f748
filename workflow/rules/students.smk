# Students: trained from their initialisation with the losses of their experiment.


rule distill:
    input:
        unpack(inputs_of("students/{experiment}/manifest.json")),
    output:
        manifest="<root>/students/{experiment}/manifest.json",
        weights="<root>/students/{experiment}/model.safetensors",
        metrics="<root>/students/{experiment}/metrics.jsonl",
    log:
        "<root>/logs/distill/{experiment}.log",
    conda:
        CONDA
    threads: resource("distill", "threads")
    resources:
        mem_mb=resource("distill", "mem_mb"),
        runtime=resource("distill", "runtime"),
        gpu=resource("distill", "gpu"),
        launcher=launcher("distill"),
    params:
        **part_of_plan("students/{experiment}/manifest.json"),
    shell:
        "{resources.launcher} stages.distill --root {params.root} --manifest students/{wildcards.experiment}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"
