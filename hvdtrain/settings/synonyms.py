"""What people call settings elsewhere, and what they are called here: for messages, nothing is renamed in silence."""

from __future__ import annotations

from collections.abc import Collection

# Name here -> names in other frameworks and scripts, as words with underscores.
_SETTINGS = {
    "train.steps": (
        "max_steps num_steps total_steps max_iters num_iters iterations iters n_steps updates max_updates"
        " limit_train_batches num_train_steps training_steps train_steps total_iters max_train_steps"
        " lr_decay_iters niter"
    ),
    "train.epochs": "num_epochs max_epochs n_epochs num_train_epochs epoch min_epochs nb_epochs total_epochs",
    "train.global_batch_size": (
        "batch batch_size bs train_batch_size total_batch_size effective_batch_size b train_bs global_batch"
        " batch_size_train"
    ),
    "train.micro_batch_size": (
        "batch_size bs per_device_train_batch_size per_device_batch_size per_gpu_batch_size local_batch_size"
        " device_batch_size micro_batch mbs ubatch batch_size_per_gpu"
    ),
    "train.accum_steps": (
        "gradient_accumulation_steps grad_accum grad_accum_steps accumulation accumulate_grad_batches accum"
        " gradient_accumulation backward_passes_per_step batches_per_allreduce grad_accumulation_steps gas"
        " iter_size"
    ),
    "train.max_time": "time_limit walltime timeout max_duration",
    "train.seed": "random_seed manual_seed rng_seed data_seed seed_everything random_state",
    "train.precision": (
        "amp bf16 fp16 fp32 half mixed_precision dtype autocast use_amp bfloat16 float16 use_mixed_precision"
        " amp_dtype fp16_opt_level torch_dtype apex allow_tf32 tf32"
    ),
    "train.max_grad_norm": (
        "clip grad_clip clip_grad gradient_clip gradient_clip_val grad_norm clip_grad_norm max_norm"
        " gradient_clipping clip_grad_value clip_value max_norm_clip clip_gradients"
    ),
    "train.deterministic": "use_deterministic_algorithms cudnn_deterministic full_determinism",
    "train.ema": "ema_decay use_ema averaging model_ema model_ema_decay ema",
    "optim.name": "optimizer optim opt optimizer_name optimizer_type optim_type",
    "optim.peak_lr": (
        "lr learning_rate base_lr max_lr learningrate alpha initial_lr init_lr lr0 eta peak_learning_rate warmup_lr"
    ),
    "optim.schedule": (
        "scheduler lr_scheduler lr_schedule sched lr_scheduler_type lr_decay decay_lr lr_decay_style"
        " lr_policy cosine lr_sched"
    ),
    "optim.warmup_steps": (
        "warmup warmup_iters num_warmup_steps warmup_epochs lr_warmup_epochs lr_warmup_steps warmup_updates"
        " lr_warmup_iters"
    ),
    "optim.warmup_fraction": "warmup_ratio",
    "optim.final_lr_fraction": "min_lr final_lr eta_min lr_min min_learning_rate lr_end end_lr min_lr_ratio",
    "optim.weight_decay": "wd decay l2 l2_reg regularization weight_decay_rate",
    "optim.beta1": "betas adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "epsilon adam_epsilon opt_eps",
    "comm.compression": (
        "fp16_allreduce compress gradient_compression wire_dtype powersgd topk powersgd_rank fp16_compression"
        " grad_compression"
    ),
    "comm.compression_warmup_steps": "start_powersgd_iter compression_warmup",
    "comm.compression_exact": "compression_exclude skip_compression exclude_from_compression",
    "comm.bucket_mib": "fusion_threshold bucket_cap_mb bucket_size",
    "comm.op": "adasum use_adasum reduction adasum_gpu",
    "log.every": (
        "log_every log_interval logging_steps log_steps print_freq print_every log_freq log_every_n_steps"
        " logging_strategy verbose_step display_step"
    ),
    "log.tensorboard": "tb logger report_to use_tensorboard tensorboard_dir",
    "log.wandb": "use_wandb weights_and_biases report_to wandb_log log_wandb",
    "log.mlflow": "use_mlflow report_to",
    "log.peak_tflops": "peak_flops peak_tflops gpu_peak_flops mfu log_mfu",
    "log.project": "wandb_project mlflow_experiment experiment experiment_name project_name",
    "eval.every": (
        "eval_interval eval_steps val_every val_check_interval eval_freq evaluation_strategy validate_every"
        " eval_strategy check_val_every_n_epoch evaluate_every val_freq validation_steps test_every"
        " val_interval"
    ),
    "eval.patience": (
        "patience early_stopping early_stopping_patience early_stop stop_patience patience_epochs early_stopping_rounds"
    ),
    "eval.beams": "num_beams beam_size beam",
    "eval.samples": "max_eval_samples predict_with_generate eval_samples num_eval_samples",
    "eval.batch_size": (
        "eval_batch_size val_batch_size test_batch_size per_device_eval_batch_size test_bs eval_bs"
        " validation_batch_size"
    ),
    "checkpoint.every": (
        "save_every save_steps save_interval checkpoint_interval save_freq checkpoint_every save"
        " save_strategy checkpoint_freq always_save_checkpoint enable_checkpointing save_every_n_steps"
        " recovery_interval"
    ),
    "checkpoint.keep_last": (
        "save_total_limit keep max_checkpoints save_top_k checkpoint_hist checkpoints_total_limit keep_last_n"
        " max_to_keep"
    ),
    "profile.timeline": "profile profiler trace profile_steps tracing timeline",
    "model.compile": "torch_compile jit torchcompile use_compile compile_model",
    "model.checkpoint_blocks": "gradient_checkpointing activation_checkpointing recompute grad_checkpointing",
    "model.sync_batch_norm": "sync_bn syncbn sync_batchnorm sync_batch_norm dist_bn",
    "model.num_layers": "layers n_layer n_layers depth num_hidden_layers num_blocks",
    "model.hidden_size": "n_embd d_model dim width embed_dim hidden hidden_dim",
    "model.num_heads": "n_head n_heads heads num_attention_heads",
    "model.name": "model arch architecture model_name net network backbone a recipe_model",
    "model.lora_rank": "lora_r r lora use_lora peft use_peft qlora",
    "model.lora_targets": "target_modules lora_target_modules lora_modules",
    "model.freeze_features": "freeze_feature_encoder freeze_feature_extractor",
    "model.path": "model_name_or_path model_name pretrained from_pretrained",
    "model.init_from": "init checkpoint weights load_from resume_weights initial_checkpoint pretrained_weights",
    "data.path": (
        "data dataset data_dir data_path train_file train_data train_dir input text corpus datadir audio"
        " dataset_name text_file files"
    ),
    "data.max_seconds": "max_duration max_duration_in_seconds max_clip_length",
    "data.source_field": "source_column src_column text_column input_column",
    "data.target_field": "target_column tgt_column summary_column output_column",
    "data.source_language": "source_lang src_lang",
    "data.target_language": "target_lang tgt_lang forced_bos_token",
    "data.val_path": "val_data eval_file validation_file val_file eval_data val_dir valid_file eval_dataset test_file",
    "data.root": (
        "data dataset_root data_dir data_path datadir train_dir traindir image_dir imagenet imagenet_dir"
        " image_folder imagefolder images"
    ),
    "data.sequence_length": (
        "block_size seq_len seq_length sequence_len max_length context_length max_seq_len ctx_len"
        " max_seq_length n_ctx n_positions seqlen model_max_length"
    ),
    "data.image_size": "img_size image_size crop_size train_crop_size val_crop_size resolution imgsz input_size",
    "data.val_resize": "val_resize_size resize resize_size",
    "data.augment": "augmentation augmentations aug transforms no_aug",
    "data.auto_augment": "aa auto_augment_policy rand_augment randaugment",
    "data.random_erase": "reprob random_erasing erasing",
    "data.mixup": "mixup_alpha",
    "data.cutmix": "cutmix_alpha",
    "data.flip": "hflip hflip_prob",
    "labels.smoothing": "label_smoothing smoothing label_smoothing_factor ls",
    "optim.decay_factor": "gamma lr_gamma decay_rate lr_decay_rate",
    "optim.milestones": "lr_steps lr_milestones decay_epochs lr_decay_steps lr_decay_epochs",
    "optim.step_fraction": "lr_step_size step_size",
    "optim.shard": "zero zero_stage fsdp deepspeed sharded_ddp zero_optimizer",
    "optim.trust": "trust_coefficient trust_coeff eta",
    "data.workers": (
        "num_workers workers dataloader_num_workers j preprocessing_num_workers data_workers num_proc"
        " nworkers n_workers"
    ),
    "health.stall_limit": "watchdog stall_timeout hang_timeout",
    "optim.momentum": "mom",
    "data.val_fraction": "validation_split_percentage validation_split val_split val_ratio test_size eval_split",
    "data.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_path",
    "data.ahead": "prefetch prefetch_factor dataloader_prefetch_factor",
    "optim.offload": "cpu_offload offload_optimizer",
    "model.lora_alpha": "lora_scaling",
    "warmup": "num_warmup_batches num_warmup_iters",
    "rounds": "num_repeats repeats",
    "run_dir": (
        "output_dir out_dir outdir save_dir logdir log_dir checkpoint_dir workdir work_dir out resume"
        " resume_from resume_from_checkpoint load restart continue resume_path ckpt ckpt_path output"
        " default_root_dir logging_dir run_name checkpoint_format wandb_run_name name resume_training"
    ),
    "dry_run": "dry test check noop fast_dev_run debug_run",
    "print_config": "show_config dump_config show",
    "config": "cfg config_file conf yaml config_name config_path args_file yaml_config",
    "max_tokens": "max_new_tokens length num_tokens",
    "temperature": "temp",
}

# What is no setting here -> what to do instead.
_ELSEWHERE = {
    "gpus gpu num_gpus devices nproc nproc_per_node ngpus np n_gpu ranks world_size nodes nnodes num_nodes n"
    " num_machines num_processes accelerator distributed ddp strategy backend launcher local_size"
    " ddp_backend dist_backend dist_url multiprocessing_distributed standalone"
    " init_method": ("the launcher says how many ranks there are: horovodrun -np 4 python -m hvdtrain ..."),
    "rank local_rank node_rank machine_rank rdzv_endpoint rdzv_backend master_addr master_port hosts hostfile": (
        "the launcher says which rank this is and on which host: horovodrun -np 4 -H a:2,b:2 python -m hvdtrain ..."
    ),
    "cuda cpu use_cuda use_cpu no_cuda no_gpu device": (
        "GPUs are used where there are any; CUDA_VISIBLE_DEVICES= (empty) trains on the CPU"
    ),
    "fusion_threshold_mb cycle_time_ms cache_capacity timeline_filename timeline_mark_cycles autotune gloo mpi jsrun"
    " network_interface network_interfaces host_discovery_script min_np max_np ssh_port start_timeout elastic_timeout"
    " reset_limit slots_per_host slots output_filename check_build hierarchical_allreduce hierarchical_allgather H"
    " min_num_proc max_num_proc num_proc_per_host": (
        "horovodrun's own options stand before the program: horovodrun --timeline-filename FILE -np 4 python -m"
        " hvdtrain ...; elastic jobs are started by python -m hvdtrain supervise"
    ),
    "gradient_predivide_factor num_groups sparse_as_dense": (
        "each rank's part is divided before it is added, and gradients travel in buckets: --comm.bucket-mib"
    ),
    "ddp_find_unused_parameters find_unused_parameters static_graph": (
        "parameters that a step does not use are averaged rightly as they are"
    ),
    "pretrained weights use_pretrained": (
        "the recipes hf, seq2seq and ctc begin with the weights in --model.path, others with those of a run of the same"
        " model where they have --model.init-from"
    ),
    "interpolation antialias use_v2": "images are resized as torchvision's references do it by default",
    "neptune comet clearml aim swanlab trackio tracker": (
        "metrics are in RUN_DIR/metrics.jsonl, and with --log.tensorboard, --log.wandb or --log.mlflow there, too; for"
        " any other tracker, give your recipe a sink: Task(sinks=[...])"
    ),
    "version v": "python -m hvdtrain --version",
    "help h": "python -m hvdtrain VERB [RECIPE] --help",
    "do_train do_eval do_predict eval_iters eval_only test_only evaluate e limit_val_batches num_sanity_val_steps"
    " max_val_samples max_eval_samples"
    " limit_test_batches no_eval": "train evaluates as often as --eval.every says, and at the end",
    "load_best_model_at_end metric_for_best_model greater_is_better save_best_only save_best monitor eval_metric": (
        "the checkpoint of the lowest held-out loss is always kept: generate, export and predict take --checkpoint best"
    ),
    "push_to_hub hub_model_id hub_token hub_strategy upload": (
        "python -m hvdtrain export RUN_DIR writes what transformers, or torch, reads, for you to upload"
    ),
    "callbacks callback hooks": "a recipe of yours has them: Task(callbacks=[...])",
    "benchmark cudnn_benchmark": "python -m hvdtrain bench RECIPE measures",
    "detect_anomaly": "a step that is not finite is skipped and told; in a recipe, torch.autograd.set_detect_anomaly",
    "pin_memory pin_mem dataloader_pin_memory no_pin_mem": "batches for GPUs are always pinned",
    "persistent_workers": "workers live as long as the run",
    "drop_last dataloader_drop_last": "all samples of an epoch are used; in a recipe of yours, Task(drop_last=True)",
    "shuffle sampler": "training data are shuffled anew in each epoch; in a recipe of yours, Task(sampler=...)",
    "start_epoch epoch_offset": "a run goes on from the newest checkpoint in its --run-dir",
    "enable_progress_bar disable_tqdm no_progress_bar progress": (
        "standard output that is no terminal, as in a pipe or a file, gets plain lines and no bar"
    ),
    "trust_remote_code": "no code of models is run",
    "group_by_length": "seq2seq and ctc put samples of a length together by themselves",
    "ref_model ref_model_path reference reference_model": "the reference is the model as it is before the first step",
    "sampling_rate sample_rate": "clips of any rate are resampled to the one that the model hears",
    "verbose verbosity debug quiet q log_level loglevel": (
        "every rank writes RUN_DIR/logs/rank-000.log; there is no level to set"
    ),
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
