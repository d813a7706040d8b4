"""Command lines as users of other programs would type them: each word leads to a setting, a verb, or what to do."""

import pytest

from hvdtrain import cli
from hvdtrain.errors import ConfigError
from hvdtrain.verbs.table import VERBS

# Where they come from -> the recipe, and what they would type.
FLAGS = {
    "nanoGPT": (
        "lm",
        "out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log"
        " wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head"
        " n_embd learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters"
        " min_lr backend device dtype compile",
    ),
    "the HF Trainer and its scripts": (
        "hf",
        "output_dir per_device_train_batch_size per_device_eval_batch_size num_train_epochs max_steps eval_strategy"
        " evaluation_strategy eval_steps save_strategy save_steps save_total_limit logging_strategy logging_steps"
        " logging_dir load_best_model_at_end metric_for_best_model push_to_hub hub_model_id report_to run_name seed"
        " data_seed dataloader_num_workers dataloader_pin_memory dataloader_drop_last max_grad_norm adam_beta1"
        " adam_beta2 adam_epsilon torch_compile ddp_backend ddp_find_unused_parameters local_rank deepspeed fsdp"
        " gradient_checkpointing gradient_accumulation_steps lr_scheduler_type warmup_ratio warmup_steps weight_decay"
        " model_name_or_path tokenizer_name dataset_name train_file validation_file validation_split_percentage"
        " max_seq_length preprocessing_num_workers cache_dir trust_remote_code do_train do_eval overwrite_output_dir"
        " resume_from_checkpoint bf16 fp16 tf32 use_cpu disable_tqdm lora_r lora_alpha lora_dropout use_peft"
        " torch_dtype max_train_steps max_eval_samples log_level chat_template",
    ),
    "Lightning": (
        "resnet",
        "max_epochs min_epochs max_steps devices accelerator num_nodes strategy precision gradient_clip_val"
        " accumulate_grad_batches log_every_n_steps val_check_interval check_val_every_n_epoch fast_dev_run"
        " limit_train_batches limit_val_batches default_root_dir logger callbacks benchmark deterministic"
        " detect_anomaly sync_batchnorm profiler ckpt_path seed_everything max_time enable_checkpointing"
        " enable_progress_bar"
        " trainer.max_epochs trainer.devices trainer.precision model.learning_rate data.batch_size data.num_workers",
    ),
    "Horovod's examples and horovodrun": (
        "resnet",
        "no_cuda use_adasum fp16_allreduce batches_per_allreduce gradient_predivide_factor train_dir log_dir"
        " checkpoint_format base_lr warmup_epochs momentum wd num_iters use_mixed_precision log_interval"
        " test_batch_size val_batch_size data_dir np H hosts hostfile timeline_filename autotune fusion_threshold_mb"
        " cycle_time_ms gloo network_interface min_np max_np host_discovery_script start_timeout verbose",
    ),
    "DDP, torchrun, torchvision's references and timm": (
        "resnet",
        "nproc_per_node nnodes node_rank master_addr master_port standalone dist_url dist_backend world_size rank gpu"
        " multiprocessing_distributed arch a j b workers epochs lr wd momentum print_freq resume start_epoch evaluate"
        " pretrained data_path model device opt lr_scheduler lr_warmup_epochs lr_step_size lr_gamma lr_min output_dir"
        " sync_bn test_only auto_augment random_erase amp model_ema model_ema_decay use_deterministic_algorithms"
        " interpolation val_resize_size val_crop_size train_crop_size clip_grad_norm label_smoothing mixup_alpha"
        " cutmix_alpha weights aa reprob smoothing hflip sched decay_epochs patience_epochs img_size pin_mem"
        " channels_last clip_grad opt_eps checkpoint_hist log_wandb experiment eval_metric torchcompile no_aug",
    ),
}

VERB_LINES = {
    "fit": "'train'",
    "run lm": "'train'",
    "python train.py": "horovodrun -np 2 python train.py",
    "launch lm": "horovodrun -np 4 python -m hvdtrain train lm",
    "torchrun": "horovodrun -np 4",
    "resnet": "'train resnet'",
    "my_recipe.py": "'train my_recipe.py'",
    "list": "--help names",
    "config": "--print-config",
    "eval runs/a": "'report'",
    "benchmark resnet": "'bench'",
    "tensorboard": "'report'",
    "install": "'setup'",
    "setpu": "'setup'",
    "superwise": "'supervise'",
    "watchdog": "'supervise'",
    "trian lm": "'train'",
    "infer runs/a": "'predict'",
    "sample runs/a": "'generate'",
    "hpo lm": "'sweep'",
    "diff a b": "'compare'",
    "monitor runs/a": "'watch'",
    "to-hf runs/a": "'export'",
    "train gpt2": "'hf'",
    "train nanogpt": "'lm'",
    "train cifar10": "'resnet'",
    "train settings.toml": "train RECIPE --config FILE",
    "train config.yaml": "the file is TOML",
    "train lm train.steps=5": "settings are written --section.setting VALUE",
    "train lm lr 3": "settings are written --section.setting VALUE",
}


@pytest.mark.parametrize("origin", FLAGS)
def test_every_flag_leads_somewhere(origin):
    recipe, words = FLAGS[origin]
    lost = {}
    for word in words.split():
        try:
            cli.parse(["train", recipe, f"--{word}", "1"])
        except ConfigError as error:
            says = str(error)
            assert "\n" not in says
            if "there is no flag" in says and ("did you mean" not in says and ": " not in says.split("'", 2)[2]):
                lost[word] = says
    assert lost == {}


@pytest.mark.parametrize("line", VERB_LINES)
def test_every_verb_leads_somewhere(line):
    with pytest.raises(ConfigError) as caught:
        cli.parse(line.split())
    assert VERB_LINES[line] in str(caught.value)


@pytest.mark.parametrize("verb", [*VERBS, "lm", "resnet"])
@pytest.mark.parametrize("word", ["help", "--help", "-h"])
def test_help_of_a_verb_before_or_behind_it(verb, word):
    train = ["train"] if verb in ("lm", "resnet") else []
    assert cli.parse([word, verb]) == cli.parse([*train, verb, "--help"])
