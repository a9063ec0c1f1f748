# tokenstill: moves knowledge between language models that do not share a tokenizer.
#   snakemake --cores all                             the demo (config/config.yaml)
#   snakemake --cores all --configfile my.yaml        your own
#   snakemake --profile slurm --configfile my.yaml    on a cluster

from snakemake.utils import min_version

min_version("9.27")


if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/artifacts.smk"
include: "workflow/rules/text.smk"
include: "workflow/rules/tokenizers.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/teachers.smk"
include: "workflow/rules/students.smk"
include: "workflow/rules/evaluation.smk"


rule all:
    default_target: True
    input:
        everything(),


rule teachers:
    input:
        everything("teacher_index"),


rule tokenizer_pairs:
    input:
        everything("tokenizer_stats", "mined_mapping"),


rule students:
    input:
        everything("distill"),
