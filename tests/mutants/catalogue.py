"""The planted bugs. Each names its row of the failures in docs/explanation/trust.md, and the check that sees it."""

from mutants import bookkeeping, code_sums, encodings, instruments, second_release, whole_runs
from mutants.planted import mutant

FIRST_ROWS = (  # who takes part, what is summed: rows 1 to 9
    mutant(
        "batches of one fixed size", 1, instruments.sampler, "privacy.poisson:example_ids",
        "np.flatnonzero(uniform < sampling_prob)",
        "np.sort(np.argsort(uniform)[: round(num_examples * sampling_prob)])",
    ),
    mutant(
        "batches of shuffled epochs", 1, instruments.sampler, "privacy.poisson:example_ids",
        "generator(key, Purpose.SAMPLING, step).random(num_examples)",
        "(generator(key, Purpose.SAMPLING, step // 5).permutation(num_examples) / num_examples + step % 5 / 5) % 1",
    ),
    mutant(
        "the same batch in every step", 1, instruments.sampler, "privacy.poisson:example_ids",
        "Purpose.SAMPLING, step", "Purpose.SAMPLING, 0",
    ),
    mutant(
        "twice the sampling probability", 1, instruments.sampler, "privacy.poisson:example_ids",
        "uniform < sampling_prob", "uniform < 2 * sampling_prob",
    ),
    mutant(
        "the cap keeps the first ids", 1, instruments.sampler, "privacy.poisson:example_ids",
        "ids[np.sort(kept)]", "ids[:truncated_batch_size]",
    ),
    mutant(
        "two Poisson samples under one noise", 2, instruments.delivery, "training:train_steps",
        "total = clipper.zeros()",
        "ids = np.union1d(ids, example_ids(key, step + 1000, len(images), mechanism.sampling_prob)); "
        "total = clipper.zeros()",
    ),
    mutant(
        "an incomplete micro-batch is dropped", 2, instruments.delivery, "training:micro_batches",
        "range(0, len(ids), size)", "range(0, len(ids) - size + 1, size)",
    ),
    mutant(
        "padding repeats record 0", 2, instruments.delivery, "training:micro_batches",
        "constant_values=-1", "constant_values=0",
    ),
    mutant(
        "the divisor is the batch that came", 3, instruments.replay, "training:train_steps",
        "noisy, mechanism.expected_batch_size", "noisy, max(1, len(ids))",
    ),
    mutant(
        "the divisor is rounded down", 3, instruments.update, "gradients.optimizer:apply_update",
        "noisy_sum[name] / expected_batch_size", "noisy_sum[name] / int(expected_batch_size)",
    ),
    mutant(
        "the divisor comes from a private N", 3, whole_runs.public_values, "preparation:make_mechanism",
        "expected_batch_size=batch", "expected_batch_size=batch if public else num_examples * privacy.sampling_prob",
    ),
    mutant(
        "q is one over the number of batches", 3, instruments.delivery, "training:train_steps",
        "mechanism.sampling_prob", "1 / -(-len(images) // recipe.train.train_batch_size)",
    ),
    mutant(
        "what is not finite counts", 4, instruments.replay, "gradients.functional:Clip.sum",
        "usable = norms.isfinite()", "usable = torch.ones_like(norms, dtype=torch.bool)",
    ),
    mutant(
        "what is not finite is multiplied by zero", 4, instruments.replay, "gradients.functional:Clip.sum",
        "if not all_usable:", "if False:",
    ),
    mutant(
        "NaN becomes zero after the noise", 4, instruments.replay, "gradients.noise:add_noise",
        "noise.to(tensor.device)).float()", "noise.to(tensor.device)).float().nan_to_num()",
        "gradients.functional:Clip.sum",
        "usable = norms.isfinite()", "usable = torch.ones_like(norms, dtype=torch.bool)",
    ),
    mutant(
        "an overflow empties its micro-batch", 5, instruments.replay, "gradients.functional:Clip.sum",
        "torch.where(usable, self.factors(norms), 0.0)", "torch.where(usable.all(), self.factors(norms), 0.0)",
    ),
    mutant(
        "an overflow skips the step", 5, instruments.replay, "gradients.functional:Clip.sum",
        "factors = torch.where(usable, self.factors(norms), 0.0)",
        "factors = torch.where(usable, self.factors(norms), torch.inf)",
        "training:train_steps",
        "noisy = privatize(",
        "if not all(tensor.isfinite().all() for tensor in total.values()):\n            continue\n"
        "        noisy = privatize(",
    ),
    mutant(
        "a forward in float16 is accepted", 5, instruments.refusals, "gradients.refusals:refuse_float16",
        "if torch.float16 in", "if torch.float64 in",
    ),
    mutant(
        "the micro-batch is clipped, not its examples", 6, instruments.replay, "gradients.functional:Clip.sum",
        "norms = flat_norms(gradients)",
        "norms = flat_norms({name: g.mean(dim=0, keepdim=True).expand_as(g) for name, g in gradients.items()})",
    ),
    mutant(
        "no clipping", 6, instruments.replay, "gradients.functional:Clip.factors",
        "(target / norms).clamp(max=1.0)", "torch.ones_like(norms)",
    ),
    mutant(
        "the clip bound is the largest norm of the batch", 6, instruments.replay, "gradients.functional:Clip.factors",
        "target = self.max_grad_norm", "target = norms[norms.isfinite()].median()",
    ),
    mutant(
        "draws are examples", 7, instruments.replay, "training:train_steps",
        "micro_batches(ids,", "micro_batches(np.repeat(ids, recipe.train.noise_multiplicity),",
    ),
    mutant(
        "draws are averaged over the batch", 7, instruments.replay, "diffusion.objectives:Objective.losses",
        ".view(b, rows).mean(dim=1)", ".view(rows, b).mean(dim=0)",
    ),
    mutant(
        "every tensor is clipped by itself", 8, instruments.replay, "gradients.functional:Clip.sum",
        "(factors @ rows.double())",
        "(torch.where(usable, self.factors(flat_norms({name: gradient})), 0.0) @ rows.double())",
    ),
    mutant(
        "timesteps are stratified over the batch", 9, bookkeeping.draws, "diffusion.draws:draw_levels",
        "(np.arange(draws) + uniform)",
        "(np.arange(draws) + (uniform + np.arange(len(ids))[:, None, None] / len(ids)) % 1)",
    ),
    mutant(
        "noise is keyed by place in the batch", 9, instruments.invariance, "diffusion.draws:draw_noise",
        "for i in ids", "for i in range(len(ids))",
    ),
    mutant(
        "labels are dropped by place in the batch", 9, bookkeeping.draws, "diffusion.draws:draw_dropped_labels",
        "for i in ids", "for i in range(len(ids))",
    ),
    mutant(
        "the loss mixes the batch", 9, instruments.replay, "batches:make_loss",
        'return losses * batch["weights"]', 'return losses * batch["weights"] * losses.mean()',
    ),
    mutant(
        "captions are padded to the longest of their own", 9, encodings.encodings,
        "diffusion.text_encoding:TextEncoders._tokens", 'padding="max_length"', 'padding="longest"',
    ),
    mutant(
        "images are changed by place in the batch", 9, encodings.encodings, "diffusion.augmentation:augment",
        "for i in ids", "for i in range(len(ids))",
    ),
    mutant(
        "batch norm is accepted", 9, instruments.refusals, "gradients.refusals:_module_problem",
        "if isinstance(module, nn.modules.batchnorm._BatchNorm):", "if False:",
    ),
    mutant(
        "training mode is accepted", 9, instruments.refusals, "gradients.refusals:_module_problem",
        "if module.training:", "if False:",
    ),
    mutant(
        "the last chunk is not padded", 9, instruments.delivery, "training:micro_batches",
        "np.pad(chunk, (0, size - len(chunk)), constant_values=-1)", "chunk",
    ),
)  # fmt: skip

MIDDLE_ROWS = (  # noise, keys, attempts, numbers: rows 10 to 20
    mutant(
        "noise is divided among ranks", 10, instruments.noise, "gradients.noise:add_noise",
        "noise_stddev * normal", "noise_stddev / 2 * normal",
    ),
    mutant(
        "noise is a tenth low", 10, instruments.audit, "gradients.noise:add_noise",
        "noise_stddev * normal", "0.9 * noise_stddev * normal",
    ),
    mutant(
        "noise is a hundredth low", 10, instruments.noise, "gradients.noise:add_noise",
        "noise_stddev * normal", "0.99 * noise_stddev * normal",
    ),
    mutant(
        "noise without the clip bound", 10, instruments.noise, "privacy.mechanism:DPMechanism.noise_stddev",
        "* self.max_grad_norm", "",
    ),
    mutant(
        "noise is uniform", 10, instruments.noise, "gradients.noise:add_noise",
        "noise_stddev * normal", "noise_stddev * stream.uniform(-(3**0.5), 3**0.5, tuple(tensor.shape))",
    ),
    mutant(
        "half of the tensors get noise", 10, instruments.noise, "gradients.noise:add_noise",
        "noise_stddev * normal", "noise_stddev * normal * (len(noisy) % 2)",
    ),
    mutant(
        "all tensors get the same noise", 10, instruments.noise, "gradients.noise:add_noise",
        "noisy[name] =", "stream = generator(key, Purpose.NOISE, step); noisy[name] =",
    ),
    mutant(
        "a class row that nobody drew gets no noise", 10, instruments.noise, "gradients.noise:add_noise",
        "noise.to(tensor.device)", "noise.to(tensor.device) * tensor.ne(0)",
    ),
    mutant(
        "two records share their fate", 11, instruments.sampler, "privacy.poisson:example_ids",
        ".random(num_examples)", ".random(num_examples // 2 + 1).repeat(2)[:num_examples]",
    ),
    mutant(
        "noise for every micro-batch", 12, instruments.noise, "training:train_steps",
        "total[name] += part",
        "total[name] += add_noise({name: part}, mechanism.noise_stddev, key, step)[name]",
    ),
    mutant(
        "the sum of the step before stays", 12, instruments.replay, "training:train_steps",
        "total = clipper.zeros()", "total = total if step else clipper.zeros()",
    ),
    mutant(
        "an empty batch is no step", 13, instruments.empty_batches, "training:train_steps",
        "total = clipper.zeros()", "if len(ids) == 0: continue\n        total = clipper.zeros()",
    ),
    mutant(
        "the same noise in every step", 14, instruments.noise, "gradients.noise:add_noise",
        "Purpose.NOISE, step", "Purpose.NOISE, 0",
    ),
    mutant(
        "noise begins anew after a resume", 14, whole_runs.resumption, "training:train_steps",
        "privatize(prepared, total, key, step)", "privatize(prepared, total, key, step - first)",
    ),
    mutant(
        "a new attempt draws the old noise", 14, whole_runs.resumption, "privacy.randomness:attempt_key",
        "% attempt", "% 1",
        "runs.context:context_of", "str(promise.prior)", '""',
    ),
    mutant(
        "resumes with another learning rate under the same noise", 14, whole_runs.resumption,
        "runs.folder:RunFolder._check_same", "!= without_bookkeeping(requested)", "is None",
        "preparation:prepare", "recipe = as_resolved(recipe, load_recipe(run.recipe(last)))", "pass",
        "preparation:check_context", "before != context", "before is None",
        "privacy.randomness:attempt_key", "hkdf_sha256(run_key, context,", "hkdf_sha256(run_key, b'',",
    ),
    mutant(
        "resumes in another precision under the same noise", 14, whole_runs.resumption,
        "runs.folder:RunFolder._check_same", "!= without_bookkeeping(requested)", "is None",
        "preparation:prepare", "recipe = as_resolved(recipe, load_recipe(run.recipe(last)))", "pass",
        "runs.context:context_of", '"recipe": recipe', '"recipe": ""',
    ),
    mutant(
        "steps of an attempt that was given up are free", 15, whole_runs.resumption, "runs.attempts:charged",
        "steps = min(begun.get(number, 0), mechanism.steps)", "steps = 0",
    ),
    mutant(
        "a torn line of the ledger is no step", 15, bookkeeping.ledger, "privacy.ledger:_parse",
        "known.add(max(known, default=-1) + 1)", "pass",
    ),
    mutant(
        "a changed ledger is believed", 15, bookkeeping.ledger, "privacy.ledger:_parse",
        'entry.get("after") != _digest(before)', "False",
    ),
    mutant(
        "the ledger is written after the noise", 15, instruments.empty_batches, "training:train_steps",
        "ledger.begin(step)", "pass",
        "training:train_steps", "ema.update()", "ema.update(); ledger.begin(step)",
    ),
    mutant(
        "runs that tuned are free", 15, bookkeeping.prices, "privacy.promise:composed_event",
        "Counter({mechanism.event: runs})", "Counter({mechanism.event: 1})",
    ),
    mutant(
        "earlier releases are free", 15, bookkeeping.prices, "privacy.promise:composed_event",
        "for release in prior:", "for release in ():",
    ),
    mutant(
        "a seed decides the key", 16, bookkeeping.randomness, "privacy.randomness:new_key",
        "secrets.token_bytes(KEY_BYTES)", "np.random.bytes(KEY_BYTES)",
    ),
    mutant(
        "noise comes from torch's global generator", 16, bookkeeping.randomness, "gradients.noise:add_noise",
        "stream.standard_normal(tuple(tensor.shape))", "torch.randn(tensor.shape, dtype=torch.float64).numpy()",
    ),
    mutant(
        "a key that somebody gave is certified", 16, bookkeeping.certified, "privacy.certificate_levels:_check_key",
        'document["key_source"] != "os"', "False",
    ),
    mutant(
        "the key is cut to 32 bits", 17, bookkeeping.randomness, "privacy.randomness:generator",
        'int.from_bytes(subkey, "little")', 'int.from_bytes(subkey, "little") & 0xFFFFFFFF',
    ),
    mutant(
        "all purposes share a stream", 17, bookkeeping.randomness, "privacy.randomness:generator",
        "Purpose(purpose).encode()", "b''",
    ),
    mutant(
        "streams overlap", 17, bookkeeping.randomness, "privacy.randomness:generator",
        "counter=counter << 64", "counter=counter",
    ),
    mutant(
        "noise is a single normal", 18, bookkeeping.randomness, "gradients.noise:add_noise",
        "for _ in range(SUMMANDS)) / math.sqrt(SUMMANDS)", "for _ in range(1))",
    ),
    mutant(
        "noise is drawn in float32", 18, bookkeeping.randomness, "gradients.noise:add_noise",
        "stream.standard_normal(tuple(tensor.shape))", "stream.standard_normal(tuple(tensor.shape), dtype='f4')",
    ),
    mutant(
        "the sum is cast before the noise", 18, bookkeeping.randomness, "gradients.noise:add_noise",
        "(tensor.double() + noise.to(tensor.device)).float()", "tensor.float() + noise.to(tensor.device).float()",
    ),
    mutant(
        "norms in bfloat16", 19, instruments.replay, "gradients.functional:flat_norms",
        ".flatten(1).double(), dim=1)", ".flatten(1).bfloat16(), dim=1).double()",
    ),
    mutant(
        "norms in float16", 19, instruments.replay, "gradients.functional:flat_norms",
        ".flatten(1).double(), dim=1)", ".flatten(1).half(), dim=1).double()",
    ),
    mutant(
        "a running sum in float32", 19, instruments.replay, "gradients.functional:zeros",
        "dtype=torch.float64", "dtype=torch.float32",
    ),
    mutant(
        "the clipper has its own bound", 20, instruments.replay, "gradients.clipper:PerSampleClipper.__init__",
        "Clip(max_grad_norm, clipping, gamma)", "Clip(1.0, clipping, gamma)",
    ),
    mutant(
        "class rows are outside the norm", 20, instruments.replay, "gradients.functional:flat_norms",
        "for gradient in gradients.values()", "for name, gradient in gradients.items() if 'codes' not in name",
    ),
    mutant(
        "a module called twice counts once", 20, instruments.gradients, "gradients.taps:Pass.collect",
        "self.gradients[name] + gradient if name in self.gradients else gradient", "gradient",
    ),
    mutant(
        "a checkpoint's second forward counts again", 20, instruments.gradients, "gradients.taps:Pass._tapped_forward",
        "def forward(input: Tensor) -> Tensor:",
        "def forward(input: Tensor) -> Tensor:\n        leaf.forwards = vars(leaf).get('forwards', 0) + 1",
        "gradients.taps:Pass.collect",
        "found = site.gradients(activations, backprops, b)",
        "found = {n: g * vars(site)['forwards'] for n, g in site.gradients(activations, backprops, b).items()}",
    ),
    mutant(
        "a rule sees the first row of an example only", 20, instruments.gradients, "gradients.rules:linear",
        "torch.bmm(dy.mT, x)", "torch.bmm(dy[:, :1].mT, x[:, :1])",
    ),
    mutant(
        "a norm's rule sums over the batch", 20, instruments.gradients, "gradients.rules:_affine",
        "(dy * normed).sum(dim=1)", "(dy * normed).sum(dim=1).mean(dim=0, keepdim=True).expand(len(dy), -1)",
    ),
    mutant(
        "tied weights are accepted", 20, instruments.refusals, "gradients.refusals:check_model",
        "if parameter.requires_grad and first != name:", "if False:",
    ),
)  # fmt: skip

LAST_ROWS = (  # data, what is shown, prices, what the optimizer sees: rows 21 to 28
    mutant(
        "images are normalised by the statistics of their batch", 21, whole_runs.records,
        "diffusion.datasets:PrivateImages.read",
        "clean.float() / 127.5 - 1", "(clean.float() - clean.float().mean()) / 127.5",
    ),
    mutant(
        "latents are scaled by their own spread", 21, encodings.encodings, "diffusion.autoencoding:to_latents",
        "* scale for image in images]", "/ _encode(vae, image[None]).std() for image in images]",
    ),
    mutant(
        "latents are shifted by the mean of their batch", 21, encodings.encodings, "diffusion.autoencoding:to_latents",
        "(_encode(vae, image[None]) - shift)", "(_encode(vae, image[None]) - images.mean())",
    ),
    mutant(
        "unreadable rows are dropped before N", 21, whole_runs.records, "diffusion.datasets:PrivateImages.__len__",
        'len(self._arrays["weights"]) - 1', 'int((self._arrays["weights"] > 0).sum())',
    ),
    mutant(
        "class names are read off the rows", 21, whole_runs.records, "diffusion.datasets:_written",
        "(arrays, class_names,",
        "(arrays, tuple(class_names[c] for c in np.unique(arrays['labels'][arrays['weights'] > 0])),",
    ),
    mutant(
        "rows are ordered by content", 21, whole_runs.records, "diffusion.datasets:_written",
        "arrays = write_arrays(folder, records, reader.null, listing.num_rows)",
        "arrays = write_arrays(folder, records, reader.null, listing.num_rows); "
        "means = arrays['clean'][:-1].mean(axis=(1, 2, 3, 4)); "
        "order = np.append(np.argsort(means, kind='stable'), listing.num_rows); "
        "arrays = {name: array[order] for name, array in arrays.items()}",
    ),
    mutant(
        "an example's id is a hash of its content", 21, instruments.delivery, "training:train_steps",
        "chunk.clip(0)", "np.array([hash(x.numpy().tobytes()) % 1000 for x in images.read(chunk).clean])",
    ),
    mutant(
        "the self-check runs on private rows", 21, whole_runs.public_values, "preparation:prepare",
        "check_clipper(task, clipper)",
        "check_clipper(task, clipper, __import__('dp_peft_diffusion.attempt', fromlist=['x']).open_examples("
        "recipe.data, base, None).read([0, 1]))",
    ),
    mutant(
        "durations in metrics.jsonl", 22, whole_runs.released, "training:record_metrics",
        '"epsilon": epsilon,', '"epsilon": epsilon, "seconds": __import__("time").process_time(),',
    ),
    mutant(
        "the batch size in metrics.jsonl", 22, instruments.replay, "training:train_steps",
        "record_metrics(prepared, step + 1, noisy, spent[step])",
        "record_metrics(prepared, step + 1, noisy, float(len(ids)))",
    ),
    mutant(
        "the norm before the noise in metrics.jsonl", 22, instruments.update, "training:train_steps",
        "record_metrics(prepared, step + 1, noisy,", "record_metrics(prepared, step + 1, total,",
    ),
    mutant(
        "a private image in a grid", 23, instruments.replay, "training:train_steps",
        "write_grid(prepared, 0)",
        "write_grid(prepared, 0); private = images.read([1 % len(images)]).clean[0, 0].clamp(0, 1).mul(255).byte(); "
        "image_grid(private[None], 1).save(prepared.run.staging / 'samples' / grid_name(0))",
    ),
    mutant(
        "the place of the images is shared", 24, whole_runs.released, "sharing.export:shareable_recipe",
        "dataset_name=DATA_PLACEHOLDER", "dataset_name=recipe.data.dataset_name",
    ),
    mutant(
        "a cache of other images is read", 24, encodings.encodings, "diffusion.datasets:_kept",
        'made.get("rows") != fingerprint.rows', "False",
    ),
    mutant(
        "the key is left behind", 24, whole_runs.released, "runs.folder:RunFolder.close",
        "self.key.unlink(missing_ok=True)", "pass",
    ),
    mutant(
        "one step is priced for all", 25, bookkeeping.prices, "privacy.accounting:gaussian_event",
        "dp_accounting.SelfComposedDpEvent(step, steps)", "step",
    ),
    mutant(
        "sampling is priced twice", 25, bookkeeping.prices, "privacy.accounting:gaussian_event",
        "dp_accounting.PoissonSampledDpEvent(q,", "dp_accounting.PoissonSampledDpEvent(q * q,",
    ),
    mutant(
        "replace_one is priced as zero_out", 25, bookkeeping.prices, "privacy.accounting:_pld",
        "RELATIONS[check_neighboring_relation(neighboring_relation)]", 'RELATIONS["zero_out"]',
    ),
    mutant(
        "a group is priced as one record", 25, bookkeeping.prices, "privacy.accounting:gaussian_event",
        "GaussianDpEvent(sigma / k)", "GaussianDpEvent(sigma)",
    ),
    mutant(
        "noise follows the relation as well as the price", 25, bookkeeping.prices,
        "privacy.mechanism:DPMechanism.noise_stddev",
        "* self.max_grad_norm", '* self.max_grad_norm * (1 + (self.neighboring_relation == "replace_one"))',
    ),
    mutant(
        "a noise of NaN is priced", 25, bookkeeping.prices, "privacy.ranges:check_number",
        "not low <= value <= high", "value < low or value > high",
    ),
    mutant(
        "figures of risk are rounded down", 25, bookkeeping.prices, "privacy.ranges:round_up",
        "ROUND_CEILING", "ROUND_FLOOR",
    ),
    mutant(
        "the certificate is for the steps taken", 25, bookkeeping.certified, "privacy.certificate:certificate",
        "recorded_mechanism(mechanism) | own_choices",
        'recorded_mechanism(mechanism) | own_choices | {"count": (folder / "metrics.jsonl").read_text().count("{}")}',
    ),
    mutant(
        "verify believes the epsilon", 25, bookkeeping.certified, "privacy.certificate_levels:_check_epsilon",
        "if not priced <= promise.epsilon:", "if False:",
    ),
    mutant(
        "delta may be 1/N", 26, bookkeeping.prices, "privacy.mechanism:DPMechanism.check_delta",
        "delta * self.num_examples >= 1", "False",
    ),
    mutant(
        "Adam is fed the sum without noise", 28, instruments.noise, "training:train_steps",
        "apply_update(optimizer, parameters, noisy,",
        "apply_update(optimizer, parameters, {name: tensor.float() for name, tensor in total.items()},",
    ),
    mutant(
        "the average is fed the sum without noise", 28, instruments.update, "training:train_steps",
        "ema.update()",
        "ema.update(); [ema.average[name].sub_(0.01 * tensor.float()) for name, tensor in total.items()]",
    ),
    mutant(
        "a stray gradient reaches the optimizer", 28, instruments.stray_gradients, "gradients.optimizer:apply_update",
        "parameter.grad = noisy_sum[name] / expected_batch_size",
        "parameter.grad = noisy_sum[name] / expected_batch_size + (0 if parameter.grad is None else parameter.grad)",
    ),
)  # fmt: skip

SECOND_RELEASE = (  # the classifier that is trained directly: the same failures in a loop of its own
    mutant(
        "the classifier's null records count", 4, second_release.second_release,
        "evaluation.private_classifier:classification_losses", "losses * batch[\"weights\"]", "losses",
    ),
    mutant(
        "the classifier's batches are drawn with another probability", 3, second_release.second_release,
        "evaluation.private_classifier:clipped_sum", "mechanism.sampling_prob,", "1.2 * mechanism.sampling_prob,",
    ),
    mutant(
        "the classifier's noise lacks the clip bound", 10, second_release.second_release,
        "evaluation.private_classifier:private_steps", "add_noise(total, mechanism.noise_stddev",
        "add_noise(total, 0.01 * mechanism.noise_multiplier",
    ),
    mutant(
        "the classifier's steps share their noise", 14, second_release.second_release,
        "evaluation.private_classifier:private_steps", "noise_stddev, key, step", "noise_stddev, key, 0",
    ),
    mutant(
        "the classifier's divisor is the batch that came", 3, second_release.second_release,
        "evaluation.private_classifier:private_steps", "noisy, mechanism.expected_batch_size",
        "noisy, len(example_ids(key, step, len(images), mechanism.sampling_prob))",
    ),
    mutant(
        "the classifier keeps its last micro-batch only", 2, second_release.second_release,
        "evaluation.private_classifier:clipped_sum", "total[name] += part", "total[name] = part",
    ),
    mutant(
        "the classifier is not in the data set's ledger", 15, second_release.second_release,
        "evaluation.private_classifier:train_classifier", "if recorded:", "if False:",
    ),
    mutant(
        "the classifier is clipped by a bound of its own", 20, second_release.second_release,
        "evaluation.private_classifier:train_classifier", "PerSampleClipper(net, mechanism.max_grad_norm)",
        "PerSampleClipper(net)",
    ),
    mutant(
        "the classifier's entry in the ledger does not say whose", 15, second_release.second_release,
        "evaluation.private_classifier:train_classifier", "name, mechanism, group_column)", "name, mechanism)",
    ),
    mutant(
        "the classifier is promised to single images of a group", 25, second_release.second_prices,
        "evaluation.private_classifier:promise_beside",
        "max_examples_per_group=run.mechanism.max_examples_per_group,", "",
    ),
    mutant(
        "the classifier is promised under another relation", 25, second_release.second_prices,
        "evaluation.private_classifier:promise_beside",
        "neighboring_relation=run.mechanism.neighboring_relation,", "",
    ),
    mutant(
        "beside a classifier, the run's earlier releases are free", 15, second_release.second_prices,
        "evaluation.private_classifier:joint_epsilon", "(*run.prior, *earlier, release)", "(*earlier, release)",
    ),
)  # fmt: skip

CODE_SUMS = (  # one sum of statistics, in place of steps
    mutant(
        "a null record is summed with its class", 4, code_sums.code_sums, "batches:code_losses",
        ' * batch["weights"]', "",
    ),
    mutant(
        "codes are centred in their batch", 9, code_sums.code_sums, "diffusion.image_codes:CodeEncoder.forward",
        "self.shown(self.features(images))",
        "(lambda x: x - x.mean(dim=0) / 10)(self.shown(self.features(images)))",
    ),
    mutant(
        "rows reckon without the noise of their sums", 10, code_sums.code_sums, "preparation:make_adapter",
        "if private else 0.0", "if not private else 0.0",
    ),
    mutant(
        "products of a code with itself count twice", 20, code_sums.code_sums, "diffusion.code_moments:statistics",
        "1.0, math.sqrt(2)", "1.0, 2.0",
    ),
    mutant(
        "rows are the codes of private images", 23, code_sums.code_sums, "batches:code_losses",
        "losses = table.losses(",
        'table._drawn = table.sums.weight.detach().clone(), batch["codes"][:, 0]\n    losses = table.losses(',
    ),
)  # fmt: skip

MUTANTS = (*FIRST_ROWS, *MIDDLE_ROWS, *LAST_ROWS, *SECOND_RELEASE, *CODE_SUMS)
CHECKS = (
    instruments.replay,
    instruments.noise,
    instruments.sampler,
    instruments.delivery,
    instruments.invariance,
    instruments.empty_batches,
    instruments.update,
    instruments.stray_gradients,
    instruments.gradients,
    instruments.refusals,
    instruments.audit,
    bookkeeping.randomness,
    bookkeeping.draws,
    bookkeeping.prices,
    bookkeeping.certified,
    whole_runs.records,
    whole_runs.public_values,
    whole_runs.released,
    whole_runs.resumption,
    bookkeeping.ledger,
    encodings.encodings,
    second_release.second_release,
    second_release.second_prices,
    code_sums.code_sums,
)
