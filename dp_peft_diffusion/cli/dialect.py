"""Flags of diffusers, kohya, trl and Opacus that have no place here, each with what to use instead."""

_GRID = "use --sample_every for grids on the way, --sample_num_images and --sample_prompts for what is in them"
_RATE = "use --lr_scheduler constant, linear or cosine, with --lr_warmup_steps"
_ADAM = "use --optimizer adam with --learning_rate; its other constants are fixed"
_RESUME = (
    "the same command resumes an interrupted run by itself, from the state saved every --checkpointing_steps updates"
)
_METRICS = "public metrics are in metrics.jsonl of the run's folder; exact losses are private and go nowhere else"
_HUB = "after `dp-peft verify FOLDER`, upload the folder with `hf upload`"
_PROMPT = "prompts are captions (--caption_column) or made of labels (--prompt_template); text encoders stay frozen"
_INSTEAD = {
    "gradient_accumulation_steps": "--train_batch_size is the whole expected batch, whatever fits the device; use "
    "--micro_batch_size for what the device holds at once",
    "batch_size per_device_train_batch_size batch_gpu physical_batch_size": "use --train_batch_size for the expected "
    "batch, --micro_batch_size for what the device holds at once",
    "num_train_epochs epochs": "use --max_train_steps; N / train_batch_size steps see about as many images as an epoch",
    "train_data_dir instance_data_dir data_dir": "use --dataset_name FOLDER",
    "class_prompt train_text_encoder": _PROMPT,
    "max_train_samples": "the number of images is part of the promise: give a data set that has just these",
    "resolution": "the base decides the resolution; use another --pretrained_model_name_or_path for another",
    "random_flip": "use --augmentations flip, and --augmentation_multiplicity for more than one version in each step",
    "model_name_or_path base_model": "use --pretrained_model_name_or_path",
    "variant non_ema_revision": "use --revision, or a local folder as --pretrained_model_name_or_path",
    "cache_dir": "set the environment variable HF_HOME",
    "gradient_checkpointing enable_xformers_memory_efficient_attention": "for less memory, use a smaller "
    "--micro_batch_size; it changes nothing else",
    "scale_lr": "use --learning_rate as it is meant",
    "lr_num_cycles lr_power": _RATE,
    "use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_prodigy": _ADAM,
    "noise_offset": "the noise of the loss is the base's own; leave it out",
    "timestep_bias_strategy timestep_bias_begin timestep_bias_end weighting_scheme logit_mean logit_std": "use "
    "--timestep_distribution, --timestep_range or --snr_gamma",
    "use_ema": "use --ema_decay 0.9",
    "allow_tf32": "use --mixed_precision bf16 for speed",
    "dataloader_num_workers": "images are decoded once, before the first step; leave it out",
    "report_to logging_dir logger tracker_project_name": _METRICS,
    "checkpoints_total_limit resume_from_checkpoint save_steps save_every_n_epochs": _RESUME,
    "overwrite overwrite_output_dir": "nothing is overwritten: give another --output_dir, or remove the old folder",
    "validation_prompt validation_epochs validation_steps num_validation_images eval_steps": _GRID,
    "sample_every_n_steps sample_every_n_epochs": _GRID,
    "push_to_hub hub_model_id hub_token": _HUB,
    "output_name": "use --output_dir",
    "use_peft network_module": "use --adapter lora",
    "no_metadata": "released files hold allow-listed metadata only; `dp-peft inspect FOLDER` shows all of it",
    "poisson_sampling secure_mode": "this is always so; leave it out",
    "accountant": "PLD accounting prices the promise, and `dp-peft verify` prices it again; leave it out",
    "set": "every recipe key is an option of its own: see dp-peft train --help",
}
REFUSED = {name: advice for names, advice in _INSTEAD.items() for name in names.split()}


def refusal(option: str) -> str | None:
    """What to say to a flag of another tool; None if it is not known there either."""
    name = option.lstrip("-").replace("-", "_")
    return f"there is no --{name} here: {REFUSED[name]}." if name in REFUSED else None
