"""What people call settings elsewhere, and what they are called here: for messages, nothing is renamed in silence."""

from __future__ import annotations

from collections.abc import Collection

# Name here -> names in other frameworks and scripts, as words with underscores.
_SETTINGS = {
    "train.steps": "max_steps num_steps total_steps max_iters num_iters iterations iters n_steps updates max_updates",
    "train.epochs": "num_epochs max_epochs n_epochs num_train_epochs epoch",
    "train.global_batch_size": "batch batch_size bs train_batch_size total_batch_size effective_batch_size",
    "train.micro_batch_size": (
        "batch_size bs per_device_train_batch_size per_device_batch_size per_gpu_batch_size local_batch_size"
        " device_batch_size micro_batch"
    ),
    "train.accum_steps": (
        "gradient_accumulation_steps grad_accum grad_accum_steps accumulation accumulate_grad_batches accum"
        " gradient_accumulation backward_passes_per_step"
    ),
    "train.max_time": "time_limit walltime timeout max_duration",
    "train.seed": "random_seed manual_seed rng_seed",
    "train.precision": "amp bf16 fp16 fp32 half mixed_precision dtype autocast use_amp",
    "train.max_grad_norm": "clip grad_clip clip_grad gradient_clip gradient_clip_val grad_norm clip_grad_norm max_norm",
    "train.ema": "ema_decay use_ema averaging",
    "optim.name": "optimizer optim opt optimizer_name",
    "optim.peak_lr": "lr learning_rate base_lr max_lr learningrate alpha",
    "optim.schedule": "scheduler lr_scheduler lr_schedule sched lr_scheduler_type lr_decay",
    "optim.warmup_steps": "warmup warmup_iters num_warmup_steps warmup_epochs",
    "optim.warmup_fraction": "warmup_ratio",
    "optim.final_lr_fraction": "min_lr final_lr eta_min lr_min",
    "optim.weight_decay": "wd decay l2",
    "optim.beta1": "betas adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "epsilon adam_epsilon",
    "comm.compression": "fp16_allreduce compress gradient_compression wire_dtype powersgd topk powersgd_rank",
    "comm.compression_warmup_steps": "start_powersgd_iter compression_warmup",
    "comm.compression_exact": "compression_exclude skip_compression exclude_from_compression",
    "comm.bucket_mib": "fusion_threshold bucket_cap_mb bucket_size",
    "comm.op": "adasum use_adasum reduction",
    "log.every": "log_every log_interval logging_steps log_steps print_freq print_every log_freq",
    "log.tensorboard": "tb logger report_to",
    "log.wandb": "use_wandb weights_and_biases report_to",
    "log.mlflow": "use_mlflow report_to",
    "log.peak_tflops": "peak_flops peak_tflops gpu_peak_flops mfu log_mfu",
    "log.project": "wandb_project mlflow_experiment experiment experiment_name project_name",
    "eval.every": "eval_interval eval_steps val_every val_check_interval eval_freq evaluation_strategy validate_every",
    "eval.patience": "patience early_stopping early_stopping_patience early_stop stop_patience",
    "eval.beams": "num_beams beam_size beam",
    "eval.samples": "max_eval_samples predict_with_generate eval_samples num_eval_samples",
    "eval.batch_size": "eval_batch_size val_batch_size test_batch_size per_device_eval_batch_size",
    "checkpoint.every": "save_every save_steps save_interval checkpoint_interval save_freq checkpoint_every save",
    "checkpoint.keep_last": "save_total_limit keep max_checkpoints save_top_k",
    "profile.timeline": "profile profiler trace profile_steps tracing timeline",
    "model.compile": "torch_compile jit",
    "model.checkpoint_blocks": "gradient_checkpointing activation_checkpointing recompute grad_checkpointing",
    "model.sync_batch_norm": "sync_bn syncbn sync_batchnorm",
    "model.num_layers": "layers n_layer n_layers depth num_hidden_layers",
    "model.hidden_size": "n_embd d_model dim width embed_dim hidden hidden_dim",
    "model.num_heads": "n_head n_heads heads num_attention_heads",
    "model.name": "model arch architecture model_name net network backbone",
    "model.lora_rank": "lora_r r lora use_lora peft use_peft qlora",
    "model.lora_targets": "target_modules lora_target_modules lora_modules",
    "model.freeze_features": "freeze_feature_encoder freeze_feature_extractor",
    "model.path": "model_name_or_path model_name pretrained from_pretrained",
    "model.init_from": "init checkpoint weights load_from",
    "data.path": "data dataset data_dir data_path train_file train_data train_dir input text corpus datadir audio",
    "data.max_seconds": "max_duration max_duration_in_seconds max_clip_length",
    "data.source_field": "source_column src_column text_column input_column",
    "data.target_field": "target_column tgt_column summary_column output_column",
    "data.source_language": "source_lang src_lang",
    "data.target_language": "target_lang tgt_lang forced_bos_token",
    "data.val_path": "val_data eval_file validation_file val_file eval_data",
    "data.root": "data dataset_root data_dir data_path datadir train_dir traindir image_dir imagenet imagenet_dir",
    "data.sequence_length": "block_size seq_len seq_length sequence_len max_length context_length max_seq_len ctx_len",
    "data.image_size": "img_size image_size crop_size train_crop_size val_crop_size resolution imgsz input_size",
    "data.val_resize": "val_resize_size resize resize_size",
    "data.augment": "augmentation augmentations aug transforms",
    "data.auto_augment": "aa auto_augment_policy rand_augment randaugment",
    "data.random_erase": "reprob random_erasing erasing",
    "data.mixup": "mixup_alpha",
    "data.cutmix": "cutmix_alpha",
    "data.flip": "hflip hflip_prob",
    "labels.smoothing": "label_smoothing smoothing",
    "optim.decay_factor": "gamma lr_gamma decay_rate lr_decay_rate",
    "optim.milestones": "lr_steps lr_milestones",
    "optim.step_fraction": "lr_step_size step_size",
    "optim.shard": "zero zero_stage fsdp deepspeed sharded_ddp zero_optimizer",
    "optim.trust": "trust_coefficient trust_coeff eta",
    "data.workers": "num_workers workers dataloader_num_workers",
    "health.stall_limit": "watchdog stall_timeout hang_timeout",
    "run_dir": (
        "output_dir out_dir outdir save_dir logdir log_dir checkpoint_dir workdir work_dir out resume resume_from"
        " resume_from_checkpoint load restart continue resume_path ckpt ckpt_path output"
    ),
    "dry_run": "dry test check noop",
    "print_config": "show_config dump_config show",
    "config": "cfg config_file conf yaml",
    "max_tokens": "max_new_tokens length num_tokens",
    "temperature": "temp",
}

# What is no setting here -> what to do instead.
_ELSEWHERE = {
    "gpus num_gpus devices device nproc nproc_per_node ngpus np n_gpu ranks world_size nodes nnodes num_nodes n"
    " num_machines num_processes accelerator cuda cpu distributed ddp strategy backend": (
        "the launcher says how many ranks there are: horovodrun -np 4 python -m hvdtrain ..."
    ),
    "rank local_rank master_addr master_port hosts hostfile": (
        "the launcher says which rank this is and on which host: horovodrun -np 4 -H a:2,b:2 python -m hvdtrain ..."
    ),
    "neptune comet clearml aim swanlab trackio tracker": (
        "metrics are in RUN_DIR/metrics.jsonl, and with --log.tensorboard, --log.wandb or --log.mlflow there, too; for"
        " any other tracker, give your recipe a sink: Task(sinks=[...])"
    ),
    "version v": "python -m hvdtrain --version",
    "help h": "python -m hvdtrain VERB [RECIPE] --help",
    "do_train do_eval do_predict": "train evaluates as often as --eval.every says, and at the end",
    "ref_model ref_model_path reference reference_model": "the reference is the model as it is before the first step",
    "sampling_rate sample_rate": "clips of any rate are resampled to the one that the model hears",
    "verbose debug quiet q log_level": "every rank writes RUN_DIR/logs/rank-000.log; there is no level to set",
    "threads num_threads omp_num_threads": "set OMP_NUM_THREADS in the environment",
    "y yes force overwrite_output_dir": "a run goes on in its --run-dir, and a new run takes a new one",
}

_BY_NAME: dict[str, list[str]] = {}
for _setting, _words in _SETTINGS.items():
    for _word in _words.split():
        _BY_NAME.setdefault(_word, []).append(_setting)
_ADVICE = {word: advice for words, advice in _ELSEWHERE.items() for word in words.split()}


def meant(name: str, known: Collection[str]) -> list[str]:
    """Return the settings among `known` that someone who writes `name` may mean, by their meaning.

    A setting without its section, or with another one, is found too: `seed` and `model.seed` for `train.seed`.
    """
    last = name.replace("-", "_").lower().split(".")[-1].removeprefix("no_")
    by_meaning = [setting for setting in _BY_NAME.get(last, ()) if setting in known]
    return by_meaning or [setting for setting in known if setting.split(".")[-1] == last]


def advice(name: str) -> str:
    """Return what to do for what is no setting here; empty where nothing is known of it."""
    return _ADVICE.get(name.replace("-", "_").lower().split(".")[-1], "")
