"""Right and wrong answers to every question, and where a student's answer is put to be graded.

`python -m pytest -m zoo tests/test_assignments.py` grades them all: every right one must earn its
marks; every wrong one must be refused with a reason that names the mistake.

RIGHT: {number: {name: text}}. WRONG: {number: {name: (text, words)}}, where words is a regular
expression that the grader's reason must match. A text is the body of the function. The lines above
it are those of the reference, unless the text has its own: then it begins with "@" or "def".
"""
import textwrap

from tests.assignments import code


def placed(text, question, files):
    """These files {name: text} with an answer to this question in the place of the original."""
    file, owner, name = code.place(question.target)
    text = textwrap.dedent(text).strip("\n")
    if not text.startswith(("@", "def ")):
        original = code.find(files[file], owner, name)
        head = files[file].split("\n")[original.start:original.node.body[0].lineno - 1]
        head = [line for line in head if not line.lstrip().startswith("#")]
        text = textwrap.dedent("\n".join(head)) + "\n" + textwrap.indent(text, " " * 4)
    if owner:
        text = f"class {owner}:\n" + textwrap.indent(text, " " * 4)
    return files | {file: code.transplant(files[file], owner, name, text)}


SCHEDULE = """
super().__init__()
if num_timesteps {check}:
    raise ValueError("num_timesteps")
self.num_timesteps = num_timesteps
u = torch.arange({count}, dtype=torch.{dtype}) / num_timesteps
f = torch.cos((u + {offset}) / 1.008 * math.pi / 2) ** 2
betas = (1 - f[1:] / f[:-1]).clamp(max={most})
abar = (1 - betas).cumprod(0)
before = torch.cat([torch.ones(1, dtype=torch.{dtype}), abar[:-1]])
buffers = dict(betas=betas, alphas_cumprod=abar, signal_scale=abar.sqrt(),
               noise_scale=(1 - abar).sqrt(),
               posterior_clean=before.sqrt() * betas / (1 - abar),
               posterior_noisy=({alpha}).sqrt() * (1 - before) / (1 - abar),
               posterior_std={std})
for name, value in buffers.items():
    self.register_buffer(name, value.float(), persistent={kept})
"""


def schedule(check="< 1", count="num_timesteps + 1", dtype="float64", offset="0.008", most="0.999",
             alpha="1 - betas", std="((1 - before) / (1 - abar) * betas).sqrt()", kept="False"):
    return SCHEDULE.format(**locals())


RIGHT = {
    "1.1": {
        "numpy": """
            import numpy as np
            super().__init__()
            if num_timesteps <= 0:
                raise ValueError("too few")
            self.num_timesteps = num_timesteps
            f = np.cos((np.linspace(0, 1, num_timesteps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
            abar = np.cumprod(1 - betas)
            before = np.append(1, abar[:-1])
            for name, value in [
                    ("betas", betas), ("alphas_cumprod", abar), ("signal_scale", abar ** 0.5),
                    ("noise_scale", (1 - abar) ** 0.5),
                    ("posterior_clean", before ** 0.5 * betas / (1 - abar)),
                    ("posterior_noisy", (1 - betas) ** 0.5 * (1 - before) / (1 - abar)),
                    ("posterior_std", ((1 - before) / (1 - abar) * betas) ** 0.5)]:
                self.register_buffer(name, torch.tensor(value, dtype=torch.float32), False)
            """,
        "a loop of numbers": """
            super().__init__()
            if not num_timesteps > 0:
                raise ValueError(num_timesteps)
            self.num_timesteps = num_timesteps
            f = lambda u: math.cos(math.pi / 2 * (u + 0.008) / 1.008) ** 2
            rows, abar = [], 1.0
            for t in range(num_timesteps):
                beta = min(0.999, 1 - f((t + 1) / num_timesteps) / f(t / num_timesteps))
                before, abar = abar, abar * (1 - beta)
                rows.append((beta, abar, math.sqrt(abar), math.sqrt(1 - abar),
                             math.sqrt(before) * beta / (1 - abar),
                             math.sqrt(1 - beta) * (1 - before) / (1 - abar),
                             math.sqrt(beta * (1 - before) / (1 - abar))))
            names = ["betas", "alphas_cumprod", "signal_scale", "noise_scale", "posterior_clean",
                     "posterior_noisy", "posterior_std"]
            for name, values in zip(names, zip(*rows)):
                self.register_buffer(name, torch.tensor(values), persistent=False)
            """,
        "logarithms": schedule(std="torch.exp(0.5 * torch.log((1 - before) * betas / (1 - abar)))"),
    },
    "1.2": {
        "view": """
            shape = (-1, 1, 1)
            timesteps = torch.as_tensor(timesteps)
            signal, scale = self.signal_scale[timesteps], self.noise_scale[timesteps]
            return signal.view(shape) * actions + scale.view(shape) * noise
            """,
        "in place on its own": """
            noisy = actions * at_timestep(self.signal_scale, timesteps)
            noisy += at_timestep(self.noise_scale, timesteps) * noise
            return noisy
            """,
        "float64 inside": """
            abar = at_timestep(self.alphas_cumprod, timesteps).double()
            noisy = abar.sqrt() * actions.double() + (1 - abar).sqrt() * noise.double()
            return noisy.to(actions.dtype)
            """,
    },
    "1.3": {
        "from the product": """
            abar = at_timestep(self.alphas_cumprod, timestep)
            clean = (noisy_actions - (1 - abar).sqrt() * predicted_noise) / abar.sqrt()
            return torch.clip(clean, -1.0, 1.0)
            """,
        "minimum and maximum": """
            noise = self.noise_scale[timestep][..., None, None] * predicted_noise
            clean = (noisy_actions - noise) / self.signal_scale[timestep][..., None, None]
            one = torch.ones_like(clean)
            return torch.minimum(torch.maximum(clean, -one), one)
            """,
        "in place on its own": """
            clean = noisy_actions - at_timestep(self.noise_scale, timestep) * predicted_noise
            clean /= at_timestep(self.signal_scale, timestep)
            return clean.clamp_(-1, 1)
            """,
    },
    "1.4": {
        "mean and deviation": """
            a, b, s = (buffer[timestep].reshape(-1, 1, 1) for buffer in
                       (self.posterior_clean, self.posterior_noisy, self.posterior_std))
            clean = self.predict_clean(predicted_noise, timestep, noisy_actions)
            return torch.addcmul(a * clean + b * noisy_actions, s, noise)
            """,
        "a mask": """
            clean = self.predict_clean(predicted_noise, timestep, noisy_actions)
            last = torch.as_tensor(timestep)[..., None, None] == 0
            mean = (at_timestep(self.posterior_clean, timestep) * clean
                    + at_timestep(self.posterior_noisy, timestep) * noisy_actions)
            return torch.where(last, mean, mean + at_timestep(self.posterior_std, timestep) * noise)
            """,
        "a sample at a time": """
            timesteps = torch.as_tensor(timestep).expand(len(noisy_actions))
            clean = self.predict_clean(predicted_noise, timestep, noisy_actions)
            rows = []
            for i, t in enumerate(timesteps.tolist()):
                rows.append(self.posterior_clean[t] * clean[i]
                            + self.posterior_noisy[t] * noisy_actions[i]
                            + self.posterior_std[t] * noise[i])
            return torch.stack(rows)
            """,
    },
    "1.5": {
        "written out": """
            clean = self.predict_clean(predicted_noise, timestep, noisy_actions)
            if previous_timestep == -1:
                return clean
            abar = self.alphas_cumprod[previous_timestep]
            return abar.sqrt() * clean + (1 - abar).sqrt() * predicted_noise
            """,
        "one for -1": """
            clean = self.predict_clean(predicted_noise, timestep, noisy_actions)
            abar = torch.cat([self.alphas_cumprod, self.alphas_cumprod.new_ones(1)])
            abar = abar[previous_timestep].double()
            return (abar.sqrt() * clean + (1 - abar).sqrt() * predicted_noise).to(clean.dtype)
            """,
        "0 and 1": """
            signal, scale = 1.0, 0.0
            if previous_timestep >= 0:
                signal = self.signal_scale[previous_timestep]
                scale = self.noise_scale[previous_timestep]
            clean = self.predict_clean(predicted_noise, timestep, noisy_actions)
            return signal * clean + scale * predicted_noise
            """,
    },
    "2.1": {
        "one expression": "return m[:, 0] * h + m[:, 1]",
        "in place": "h *= m[:, 0]\nh += m[:, 1]\nreturn h",
        "chunk": "gamma, beta = m.chunk(2, dim=1)\n"
                 "return torch.addcmul(beta.squeeze(1), gamma.squeeze(1), h)",
    },
    "2.2": {
        "last": "return h * m[:, -1]",
        "unbind": "gamma, beta, alpha = m.unbind(1)\nreturn torch.mul(alpha, h)",
        "a copy": "gated = h.clone()\ngated *= m[:, 2]\nreturn gated",
    },
    "2.3": {
        "a power": """
            n = self.dim // 2
            w = 10000.0 ** (-torch.arange(n, device=timestep.device) / (n - 1))
            angles = torch.outer(timestep.float(), w)
            return self.mlp(torch.cat((torch.sin(angles), torch.cos(angles)), 1))
            """,
        "float64 inside": """
            w = torch.logspace(0, -4, self.dim // 2, dtype=torch.float64, device=timestep.device)
            angles = timestep.double().unsqueeze(1) * w
            return self.mlp(torch.cat([angles.sin(), angles.cos()], -1).float())
            """,
        "a loop": """
            n = self.dim // 2
            angles = [timestep * math.exp(-math.log(10_000) * i / (n - 1)) for i in range(n)]
            columns = [angle.sin() for angle in angles] + [angle.cos() for angle in angles]
            return self.mlp(torch.stack(columns, dim=-1))
            """,
    },
    "2.4": {
        "one product": """
            c = torch.cat([o.repeat_interleave(len(tau) // len(o), 0), tau], dim=-1)
            weight = torch.cat([self.observation_part.weight, self.time_part.weight], dim=1)
            rows = F.linear(F.mish(c), weight, self.observation_part.bias)
            return [part.reshape(len(tau), self.vectors, 1, -1)
                    for part in rows.split(self.sizes, -1)]
            """,
        "a view of draws": """
            B, K = o.shape[0], tau.shape[0] // o.shape[0]
            observed = self.observation_part(F.mish(o))[:, None].expand(-1, K, -1)
            both = observed + self.time_part(F.mish(tau)).view(B, K, -1)
            both, found, start = both.reshape(B * K, -1), [], 0
            for size in self.sizes:
                part = both[:, start:start + size]
                found.append(part.reshape(B * K, self.vectors, 1, size // self.vectors))
                start += size
            return found
            """,
        "rows that are looked up": """
            which = torch.arange(len(tau), device=tau.device) // (len(tau) // len(o))
            mish = lambda x: x * torch.tanh(F.softplus(x))
            rows = self.observation_part(mish(o))[which]
            rows = rows + self.time_part(mish(tau))
            parts = torch.split(rows, self.sizes, dim=1)
            return [torch.stack(part.chunk(self.vectors, 1), 1).unsqueeze(2) for part in parts]
            """,
    },
    "3.1": {
        "erf": """
            wide = self.up(x)
            wide = 0.5 * wide * (1 + torch.erf(wide / math.sqrt(2)))
            wide = self.mechanism.modulate(self.dropout(wide), modulation)
            branch = self.mechanism.gate(self.dropout(self.down(wide)), modulation)
            return self.mechanism.after_norm(self.norm(x + branch), modulation)
            """,
        "dropout as a function": """
            rate, on = self.dropout.p, self.training
            hidden = F.dropout(F.gelu(self.up(x)), rate, on)
            hidden = self.mechanism.modulate(hidden, modulation)
            out = F.dropout(self.down(hidden), rate, on)
            out = self.norm(self.mechanism.gate(out, modulation) + x)
            return self.mechanism.after_norm(out, modulation)
            """,
        "matrices": """
            hidden = torch.einsum("btd,hd->bth", x, self.up.weight) + self.up.bias
            hidden = self.dropout(nn.GELU()(hidden))
            hidden = self.mechanism.modulate(hidden, modulation)
            branch = hidden @ self.down.weight.T + self.down.bias
            branch = self.mechanism.gate(self.dropout(branch), modulation)
            return self.mechanism.after_norm(self.norm(torch.add(x, branch)), modulation)
            """,
    },
    "3.2": {
        "comparisons": """
            i = torch.arange(steps, device=device)[:, None]
            j = torch.arange(steps, device=device)[None]
            return (j <= i) | ((i < in_front) & (j < in_front))
            """,
        "not above": """
            later = torch.triu(torch.ones(steps, steps, device=device), diagonal=1).bool()
            later[:in_front, :in_front] = False
            return ~later
            """,
        "last seen": """
            step = torch.arange(steps, device=device)
            last = torch.where(step < in_front, in_front - 1, step)
            return step <= last.unsqueeze(1)
            """,
    },
    "3.3": {
        "softmax": """
            B, T, D = x.shape
            S, d = source.shape[1], D // self.heads
            key, value = self.key_value(source).split(D, dim=-1)
            query = self.query(x).view(B, T, self.heads, d)
            key, value = key.view(B, S, self.heads, d), value.view(B, S, self.heads, d)
            scores = torch.einsum("bthd,bshd->bhts", query, key) / math.sqrt(d)
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
            return self.output(torch.einsum("bhts,bshd->bthd", weights, value).reshape(B, T, D))
            """,
        "a head at a time": """
            D, heads = x.shape[-1], []
            d = D // self.heads
            query, (key, value) = self.query(x), self.key_value(source).chunk(2, -1)
            for start in range(0, D, d):
                q, k, v = (part[..., start:start + d] for part in (query, key, value))
                heads.append(F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=self.dropout * self.training))
            return self.output(torch.cat(heads, -1))
            """,
        "one reshape": """
            both = self.key_value(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
            query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            rate = self.dropout if self.training else 0
            mixed = F.scaled_dot_product_attention(query, *both, attn_mask=mask, dropout_p=rate)
            return self.output(mixed.permute(0, 2, 1, 3).reshape(x.shape))
            """,
    },
    "4.1": {
        "made within a device": """
            if angles.shape[-1] != len(self.link_lengths):
                raise ValueError("angles")
            with torch.device(angles.device):
                lengths = torch.tensor(self.link_lengths, dtype=angles.dtype)
                base = torch.tensor(self.base, dtype=angles.dtype)
            ends = (unit(angles.cumsum(-1)) * lengths[:, None]).cumsum(-2)
            first = torch.zeros_like(ends[..., :1, :])
            return base + torch.cat([first, ends], -2)
            """,
        "moved by another tensor": """
            if angles.shape[-1] != len(self.link_lengths):
                raise ValueError("angles")
            lengths = torch.tensor(self.link_lengths, dtype=torch.float64).to(angles)
            base = torch.tensor(self.base, dtype=torch.float64).type_as(angles)
            ends = (unit(angles.cumsum(-1)) * lengths[:, None]).cumsum(-2)
            first = torch.zeros_like(ends[..., :1, :])
            return base + torch.cat([first, ends], -2)
            """,
        "a triangular matrix": """
            N = len(self.link_lengths)
            if angles.shape[-1] != N:
                raise ValueError(f"{N} angles are needed")
            before = torch.ones(N, N, dtype=angles.dtype, device=angles.device).tril()
            lengths = angles.new_tensor(self.link_lengths)
            links = unit((before * angles.unsqueeze(-2)).sum(-1)) * lengths[:, None]
            ends = (before[..., None] * links.unsqueeze(-3)).sum(-2)
            joints = torch.cat([torch.zeros_like(ends[..., :1, :]), ends], -2)
            return joints + angles.new_tensor(self.base)
            """,
        "filled in": """
            if angles.shape[-1] != len(self.link_lengths):
                raise ValueError("angles")
            points = angles.new_zeros(*angles.shape[:-1], len(self.link_lengths) + 1, 2)
            points[..., 0, :] = angles.new_tensor(self.base)
            steps = unit(torch.cumsum(angles, -1))
            for n, length in enumerate(self.link_lengths):
                points[..., n + 1, :] = points[..., n, :].clone() + length * steps[..., n, :]
            return points
            """,
    },
    "4.2": {
        "sums of links": """
            heading = angles.cumsum(-1)
            lengths = angles.new_tensor(self.link_lengths)
            x, y = heading.cos() * lengths, heading.sin() * lengths
            tail = lambda links: links.flip(-1).cumsum(-1).flip(-1)
            return torch.stack([-tail(y), tail(x)], -2)
            """,
        "a turning matrix": """
            joints = self.joints(angles)
            arrow = joints[..., -1:, :] - joints[..., :-1, :]
            quarter = angles.new_tensor([[0.0, -1.0], [1.0, 0.0]])
            return torch.einsum("xy,...ny->...xn", quarter, arrow)
            """,
        "a column at a time": """
            joints, columns = self.joints(angles), []
            for n in range(angles.shape[-1]):
                x, y = (joints[..., -1, :] - joints[..., n, :]).unbind(-1)
                columns.append(torch.stack((-y, x), -1))
            return torch.stack(columns, -1)
            """,
    },
    "4.3": {
        "least squares": """
            jacobian = self.jacobian(angles)
            N = jacobian.shape[-1]
            like = dict(dtype=angles.dtype, device=angles.device)
            damping = (DAMPING * torch.eye(N, **like)).expand(*angles.shape[:-1], N, N)
            rows = torch.cat([jacobian, damping], -2)
            asked = torch.cat([displacement, torch.zeros(*angles.shape, **like)], -1)[..., None]
            return torch.linalg.lstsq(rows, asked).solution[..., 0]
            """,
        "joints' side": """
            J = self.jacobian(angles)
            inner = J.mT @ J + DAMPING ** 2 * torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
            return torch.linalg.solve(inner, (J.mT @ displacement.unsqueeze(-1)).squeeze(-1))
            """,
        "by hand": """
            J = self.jacobian(angles)
            a = (J[:, 0] ** 2).sum(-1) + DAMPING ** 2
            d = (J[:, 1] ** 2).sum(-1) + DAMPING ** 2
            b = (J[:, 0] * J[:, 1]).sum(-1)
            x, y = displacement.unbind(-1)
            pull = torch.stack([d * x - b * y, a * y - b * x], -1) / (a * d - b * b)[:, None]
            return torch.einsum("bxn,bx->bn", J, pull)
            """,
    },
    "5.1": {
        "a loop": "for weight in backbone.parameters():\n    weight.requires_grad = False",
        "in place": "for weight in backbone.parameters():\n    weight.detach_()",
        "eval as well": "backbone.eval()\nfor module in backbone.modules():\n"
                        "    for weight in module.parameters(recurse=False):\n"
                        "        weight.requires_grad_(False)",
    },
    "5.2": {
        "a row of each episode": """
            ends = [int(end) for end in demonstrations["episode_ends"]]
            steps, rows, start = torch.arange(first, first + length), [], 0
            for end in ends:
                frames = torch.arange(start, end)
                rows.append((frames[:, None] + steps).clamp(start, end - 1))
                start = end
            return torch.cat(rows).to(device)
            """,
        "numpy": """
            ends = np.asarray(demonstrations["episode_ends"])
            lengths = np.diff(ends, prepend=0)
            start, end = np.repeat(ends - lengths, lengths), np.repeat(ends, lengths)
            window = np.arange(ends[-1])[:, None] + np.arange(first, first + length)
            window = np.clip(window, start[:, None], end[:, None] - 1)
            return torch.from_numpy(window).to(device)
            """,
        "bucketize": """
            ends = torch.as_tensor(demonstrations["episode_ends"]).to(device)
            starts = torch.cat([torch.zeros(1, dtype=ends.dtype, device=device), ends[:-1]])
            frame = torch.arange(int(ends[-1]), device=device)
            episode = torch.bucketize(frame, ends, right=True)
            window = frame.unsqueeze(1) + torch.arange(length, device=device) + first
            window = torch.maximum(window, starts[episode].unsqueeze(1))
            return torch.minimum(window, ends[episode].unsqueeze(1) - 1)
            """,
    },
    "5.3": {
        "two operations": """
            d = ema_decay(int(num_averaged) - 1, cap)
            for average, weight in zip(averages, weights):
                average.mul_(d).add_(weight, alpha=1 - d)
            """,
        "all at once": """
            decay = ema_decay(int(num_averaged) - 1, cap)
            torch._foreach_lerp_(averages, weights, 1 - decay)
            """,
        "copied": """
            n = num_averaged.item() if torch.is_tensor(num_averaged) else num_averaged
            d = ema_decay(n - 1, cap)
            for i in range(len(averages)):
                averages[i].copy_(d * averages[i] + (1 - d) * weights[i])
            """,
    },
    "5.4": {
        "written out": """
            encoder, K = self.conditioning.encoder, self.noise_samples
            agent = encoder.agent_position(observations) if agent is None else agent
            perceived = encoder.perceive(observations)
            o = self.conditioning.encode(perceived)
            clean = self.normalise(actions, agent)
            clean = clean[:, None].expand(-1, K, -1, -1).flatten(0, 1)
            eps = torch.randn(clean.shape, dtype=clean.dtype, device=clean.device)
            k = torch.randint(0, self.ddpm.num_timesteps, (len(clean),), device=clean.device)
            clean, eps, steps = self.choose_steps(clean, eps)
            error = eps - self.predict_noise(self.ddpm.add_noise(clean, eps, k), k, o, steps)
            return error.square().mean() + encoder.auxiliary_loss(perceived)
            """,
        "numbers drawn otherwise": """
            encoder = self.conditioning.encoder
            perceived = encoder.perceive(observations)
            if agent is None:
                agent = encoder.agent_position(observations)
            clean = torch.repeat_interleave(self.normalise(actions, agent), self.noise_samples, 0)
            noise = torch.empty_like(clean).normal_()
            k = (torch.rand(len(clean), device=clean.device) * self.ddpm.num_timesteps).long()
            part, target, steps = self.choose_steps(clean, noise)
            guess = self.predict_noise(self.ddpm.add_noise(part, target, k), k,
                                       self.conditioning.encode(perceived), steps=steps)
            return nn.MSELoss()(guess, target) + encoder.auxiliary_loss(perceived)
            """,
        "repeated after": """
            encoder = self.conditioning.encoder
            agent = encoder.agent_position(observations) if agent is None else agent
            agents = agent.repeat_interleave(self.noise_samples, 0)
            clean = self.normalise(actions.repeat_interleave(self.noise_samples, 0), agents)
            perceived = encoder.perceive(observations)
            noise = torch.randn_like(clean)
            timestep = torch.randint_like(clean[:, 0, 0], self.ddpm.num_timesteps).long()
            clean, noise, steps = self.choose_steps(clean, noise)
            noisy = self.ddpm.add_noise(clean, noise, timestep)
            o = self.conditioning.encode(perceived)
            out = self.predict_noise(noisy, timestep, o, steps)
            return ((out - noise) ** 2).mean() + encoder.auxiliary_loss(perceived)
            """,
    },
    "5.5": {
        "steps that are looked up": """
            encoder = self.conditioning.encoder
            observations = encoder.read(observations, self.action_scale.device)
            chunk = self.sample(observations, generator=generator)
            actions = self.denormalise(chunk, encoder.agent_position(observations))
            start = self.first_executed()
            actions = actions[:, range(start, start + self.executed_actions)]
            if not actions.isfinite().all():
                raise FloatingPointError("no numbers")
            return torch.clip(actions, self.low, self.high)
            """,
        "checked first": """
            encoder = self.conditioning.encoder
            observations = encoder.read(observations, self.action_scale.device)
            chunk = self.sample(observations, generator)
            if torch.isnan(chunk).any():
                raise FloatingPointError("NaN")
            targets = self.denormalise(chunk, encoder.agent_position(observations))
            targets = targets.clamp(self.low, self.high)
            return targets.narrow(1, self.first_executed(), self.executed_actions)
            """,
        "detached": """
            def act(self, observations, generator=None):
                with torch.no_grad():
                    observations = self.conditioning.encoder.read(
                        observations, self.action_scale.device)
                    agent = self.conditioning.encoder.agent_position(observations)
                    actions = self.denormalise(self.sample(observations, generator), agent)
                    first = self.first_executed()
                    actions = actions[:, first:][:, :self.executed_actions]
                    if (actions != actions).any():
                        raise FloatingPointError("NaN")
                    return actions.clamp(min=self.low, max=self.high)
            """,
    },
    "5.6": {
        "polygons": """
            pose, goal = np.asarray(pose, float), np.asarray(goal, float)

            def clipped(points, keep):
                found = []
                for a, b in zip(points, points[1:] + points[:1]):
                    x, y = keep(a), keep(b)
                    if x >= 0:
                        found.append(a)
                    if x * y < 0:
                        found.append(a + (b - a) * x / (x - y))
                return found

            def one(pose):
                corners = POINTS * unit(pose[2]) + pose[0] + 1j * pose[1]
                corners = (corners - goal[0] - 1j * goal[1]) * unit(-goal[2]) - CENTER
                total = 0.0
                for box in (corners[:4], corners[4:]):
                    for (left, top), (right, bottom) in zip(LOW, HIGH):
                        points = list(box)
                        for keep in (lambda p: p.real - left, lambda p: right - p.real,
                                     lambda p: p.imag - top, lambda p: bottom - p.imag):
                            points = clipped(points, keep)
                        total += abs(sum(cross(a, b) for a, b in zip(
                            points, points[1:] + points[:1]))) / 2
                return total / BLOCK_AREA
            values = [one(row) for row in pose.reshape(-1, 3)]
            return np.array(values).reshape(pose.shape[:-1])
            """,
        "the absolute value of the sum": """
            pose, goal = np.asarray(pose, float), np.asarray(goal, float)
            turn = unit(pose[..., 2] - goal[2])[..., None, None]
            shift = as_complex(pose[..., :2] - goal[:2]) * unit(-goal[2])
            corner = shift[..., None, None] + POINTS * turn - CENTER
            edge = EDGES * turn
            (left, top), (right, bottom) = LOW.T[..., None], HIGH.T[..., None]
            start, end = np.clip(crossing(corner.real, edge.real, left, right), 0, 1)
            enter, leave = np.clip(crossing(corner.imag, edge.imag, top, bottom), start, end)
            area = 0
            for t0, t1 in (start, enter), (enter, leave), (leave, end):
                y = corner.imag + (t0 + t1) / 2 * edge.imag
                area = area + (np.clip(y, top, bottom) - top) * (t1 - t0)
            return np.abs((area * edge.real).sum((-2, -1))) / BLOCK_AREA
            """,
        "a pair of boxes at a time": """
            pose, goal = np.array(pose, float), np.array(goal, float)
            angle, center = pose[..., 2] - goal[2], as_complex(pose[..., :2] - goal[:2])
            center = (center * unit(-goal[2]))[..., None]
            total = np.zeros(pose.shape[:-1])
            for box in (slice(0, 4), slice(4, 8)):
                edge = EDGES[box] * unit(angle)[..., None]
                corner = center + POINTS[box] * unit(angle)[..., None] - CENTER
                for (left, top), (right, bottom) in zip(LOW, HIGH):
                    times = [np.zeros(edge.shape), np.ones(edge.shape)]
                    times += list(crossing(corner.real, edge.real, left, right))
                    times += list(crossing(corner.imag, edge.imag, top, bottom))
                    times = np.sort(np.clip(times, 0, 1), 0)
                    middle = corner + edge * (times[1:] + times[:-1]) / 2
                    inside = (middle.real >= left) & (middle.real <= right)
                    height = (np.clip(middle.imag, top, bottom) - top) * inside
                    total -= (height * np.diff(times, axis=0) * edge.real).sum((0, -1))
            return np.clip(total / BLOCK_AREA, 0, None)
            """,
    },
}


ACT = """
encoder = self.conditioning.encoder
observations = {read}
agent = encoder.agent_position(observations)
actions = self.denormalise(self.sample(observations, generator), agent)
executed = actions[:, {first}:{first} + {count}]
if {bad}:
    raise FloatingPointError("NaN")
return executed.clamp({low}, {high})
"""


def act(read="encoder.read(observations, self.action_scale.device)", first="self.first_executed()",
        count="self.executed_actions", bad="executed.isnan().any()", low="self.low",
        high="self.high"):
    return ACT.format(**locals())


LOSS = """
encoder = self.conditioning.encoder
if agent is None:
    agent = {agent}
clean = {clean}
perceived = encoder.perceive(observations)
o = {o}
timestep = torch.randint({count}, {drawn}, device=clean.device)
noise = {noise}
clean, noise, steps = self.choose_steps(clean, noise)
noisy = {noisy}
predicted = {predicted}
return {error} + {more}
"""


def loss(agent="encoder.agent_position(observations)",
         clean="self.normalise(actions, agent).repeat_interleave(self.noise_samples, dim=0)",
         o="self.conditioning.encode(perceived)", count="self.ddpm.num_timesteps",
         drawn="clean.shape[:1]", noise="torch.randn_like(clean)",
         noisy="self.ddpm.add_noise(clean, noise, timestep)",
         predicted="self.predict_noise(noisy, timestep, o, steps)",
         error="F.mse_loss(predicted, noise)", more="encoder.auxiliary_loss(perceived)"):
    return LOSS.format(**locals())


COVERAGE = """
pose, goal = np.asarray(pose, float), np.asarray({goal}, float)
turn = unit(pose[..., 2] - goal[2])[..., None, None]
shift = as_complex(pose[..., :2] - goal[:2]) * unit({back})
corner = shift[..., None, None] + POINTS * turn - {center}
edge = EDGES * turn
(left, top), (right, bottom) = LOW.T[..., None], HIGH.T[..., None]
start, end = np.clip(crossing(corner.real, edge.real, left, right), 0, 1)
enter, leave = np.clip(crossing(corner.imag, edge.imag, top, bottom), {inside})
area = 0
for t0, t1 in (start, enter), (enter, leave), (leave, end):
    y = corner.imag + (t0 + t1) / 2 * edge.imag
    area = area + (top - np.clip(y, top, bottom)) * (t1 - t0)
return {last}
"""


def coverage(goal="goal", back="-goal[2]", center="CENTER", inside="start, end",
             last="np.maximum((area * edge.real).sum((-2, -1)), 0) / BLOCK_AREA"):
    return COVERAGE.format(**locals())


MLP_BLOCK = """
hidden = {hidden}
hidden = {modulated}
branch = {branch}
branch = self.mechanism.gate(branch, modulation)
return {last}
"""


def mlp_block(hidden="self.dropout(F.gelu(self.up(x)))",
              modulated="self.mechanism.modulate(hidden, modulation)",
              branch="self.dropout(self.down(hidden))",
              last="self.mechanism.after_norm(self.norm(x + branch), modulation)"):
    return MLP_BLOCK.format(**locals())


ATTENTION = """
{first}
query, (key, value) = self.query(x), self.key_value(source).chunk(2, dim=-1)
query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                     for part in (query, key, value))
scores = query @ key.mT / math.sqrt({size})
weights = scores.masked_fill({hidden}, -math.inf).softmax(-1)
weights = {weights}
mixed = (weights @ {value}).transpose(1, 2).flatten(2)
return {last}
"""


def attention(first="", size="query.shape[-1]", hidden="~mask",
              weights="F.dropout(weights, self.dropout, self.training)", value="value",
              last="self.output(mixed)"):
    return ATTENTION.format(**locals())


GENERATORS = """
draws = {draws}
observed = {observed}
rows = observed + {timed}
return [part.unflatten(1, {vectors}) for part in rows.split({sizes}, dim=1)]
"""


def generators(draws="len(tau) // len(o)",
               observed="self.observation_part(F.mish(o)).repeat_interleave(draws, dim=0)",
               timed="self.time_part(F.mish(tau))", vectors="(self.vectors, 1, -1)",
               sizes="self.sizes"):
    return GENERATORS.format(**locals())


WINDOWS = """
ends = {ends}
frame = torch.arange({frames}, device={device})
episode = torch.searchsorted(ends, frame, right={right})
starts = torch.cat([ends.new_zeros(1), ends])[episode]
window = frame[:, None] + torch.arange({first}, {first} + {length}, device={device})
return window.clamp({low}, {high})
"""


def windows(ends="torch.as_tensor(demonstrations['episode_ends'], device=device)",
            frames="int(ends[-1])", device="device", right="True", first="first", length="length",
            low="starts[:, None]", high="ends[episode, None] - 1"):
    return WINDOWS.format(**locals())


JOINTS = """
lengths = torch.tensor(self.link_lengths, dtype={dtype}, device=angles.device)
{check}
heading = {heading}
links = unit(heading) * lengths[:, None]
base = torch.tensor({base}, dtype={dtype}, device=angles.device).expand_as(links[..., :1, :])
return {last}
"""


def joints(dtype="angles.dtype", heading="angles.cumsum(-1)", base="self.base",
           check="if angles.shape[-1] != len(lengths):\n    raise ValueError('angles')",
           last="torch.cat([base, links], -2).cumsum(-2)"):
    return JOINTS.format(**locals())


STEP = """
jacobian = {jacobian}
damping = {damping} * torch.eye(2, dtype={dtype}, device={device})
pull = torch.linalg.solve(jacobian @ jacobian.mT + damping, {displacement}[..., None])
return (jacobian.mT @ pull)[..., 0]
"""


def step(jacobian="self.jacobian(angles)", damping="DAMPING ** 2", dtype="angles.dtype",
         device="angles.device", displacement="displacement"):
    return STEP.format(**locals())


SINUSOID = """
half = self.dim // 2
exponents = torch.arange(half, device={device}) * -math.log({base}) / ({rates})
angles = {angles}
return {last}
"""


def sinusoid(device="timestep.device", base="1e4", rates="half - 1",
             angles="timestep[:, None] * exponents.exp()",
             last="self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))"):
    return SINUSOID.format(**locals())


NOISY = "return ({signal} * {actions} + {scale} * noise)"


def noisy(signal="at_timestep(self.signal_scale, timesteps)", actions="actions",
          scale="at_timestep(self.noise_scale, timesteps)"):
    return NOISY.format(**locals())


BACK = """
clean = {clean}
return (at_timestep(self.posterior_clean, {t}) * {first} + at_timestep(self.posterior_noisy, {t})
        * {second} + {std} * noise)
"""


def back(clean="self.predict_clean(predicted_noise, timestep, noisy_actions)", t="timestep",
         first="clean", second="noisy_actions", std="at_timestep(self.posterior_std, timestep)"):
    return BACK.format(**locals())


CLEAN = "clean = {clean}\nreturn {last}"


def clean(signal="at_timestep(self.signal_scale, timestep)",
          scale="at_timestep(self.noise_scale, timestep)", last="clean.clamp(-1, 1)", form=None):
    form = form or f"(noisy_actions - {scale} * predicted_noise) / {signal}"
    return CLEAN.format(clean=form, last=last)


LONG = """
clean = {clean}
{check}
return {last}
"""


def long_step(clean="self.predict_clean(predicted_noise, timestep, noisy_actions)",
              check="if previous_timestep < 0:\n    return clean",
              last="self.add_noise(clean, predicted_noise, previous_timestep)"):
    return LONG.format(**locals())


WRONG = {
    "1.1": {
        "without the clip": (schedule(most="1.0"), "0.999|clip"),
        "negative numbers accepted": (schedule("== 0"), "negative"),
        "float32 all along": (schedule(dtype="float32"), "float32"),
        "without the offset": (schedule(offset="0"), "offset|0.008"),
        "a variance for a deviation": (
            schedule(std="(1 - before) / (1 - abar) * betas"), "variance|posterior_std"),
        "kept in files": (schedule(kept="True"), "file"),
        "abar for alpha": (schedule(alpha="abar"), "abar|posterior_noisy"),
    },
    "1.2": {
        "writes into the caller's actions": ("""
            actions *= at_timestep(self.signal_scale, timesteps)
            actions += at_timestep(self.noise_scale, timesteps) * noise
            return actions
            """, "changed"),
        "detached": (noisy(actions="actions.detach()"), "gradient"),
        "abar without its root": (noisy(signal="at_timestep(self.alphas_cumprod, timesteps)"),
                                  "square|root"),
        "scales of a hundred timesteps": (
            noisy(signal="at_timestep(DDPM().signal_scale, timesteps)"), "another schedule"),
        "one timestep for all": (noisy(scale="self.noise_scale[timesteps].flatten()[0]"),
                                 "timestep"),
    },
    "1.3": {
        "not clipped": (clean(last="clean"), "clip"),
        "clipped to 0 and 1": (clean(last="clean.clamp(0, 1)"), "clip"),
        "clipped before it is divided": (clean(
            form="(noisy_actions - at_timestep(self.noise_scale, timestep) * predicted_noise)"
                 ".clamp(-1, 1) / at_timestep(self.signal_scale, timestep)",
            last="clean"), "clip"),
        "divided by abar": (clean(signal="at_timestep(self.alphas_cumprod, timestep)"), "abar"),
        "writes into the noisy actions": ("""
            noisy_actions -= at_timestep(self.noise_scale, timestep) * predicted_noise
            return (noisy_actions / at_timestep(self.signal_scale, timestep)).clamp(-1, 1)
            """, "changed"),
        "detached": (clean(last="clean.detach().clamp(-1, 1)"), "gradient"),
    },
    "1.4": {
        "weights swapped": (back(first="noisy_actions", second="clean"), "swapped"),
        "noise in the last step": (back(std="at_timestep(self.betas, timestep).sqrt()"),
                                   "last step"),
        "variance for deviation": (back(std="at_timestep(self.posterior_std, timestep) ** 2"),
                                   "variance"),
        "one timestep for the batch": ("timestep = torch.as_tensor(timestep).flatten()[0]"
                                       + back(), "One timestep|batch"),
        "not clipped": (
            back(clean="(noisy_actions - at_timestep(self.noise_scale, timestep) * predicted_noise)"
                       " / at_timestep(self.signal_scale, timestep)"), "clip"),
        "writes into the noise": (
            "noise *= at_timestep(self.posterior_std, timestep)" + back(std="1"),
            "changed"),
        "detached": (back(first="clean.detach()"), "gradient"),
    },
    "1.5": {
        "-1 as an index": (long_step(check=""), "-1"),
        "clean at timestep 0": (long_step(check="if previous_timestep <= 0:\n    return clean"),
                                "timestep 0|to 0"),
        "the noise derived again": (long_step(last="""(
            self.add_noise(clean, (noisy_actions - self.signal_scale[timestep] * clean)
                           / self.noise_scale[timestep], previous_timestep))"""), "derived"),
        "scales of the timestep": (long_step(
            last="self.add_noise(clean, predicted_noise, timestep)"), "scales of the timestep"),
        "not clipped": (
            long_step(clean="(noisy_actions - self.noise_scale[timestep] * predicted_noise)"
                            " / self.signal_scale[timestep]"), "clip"),
        "writes into the noisy actions": (long_step(
            last="noisy_actions.copy_(self.add_noise(clean, predicted_noise, previous_timestep))"),
            "changed"),
        "detached": (long_step(
            last="self.add_noise(clean, predicted_noise.detach(), previous_timestep)"), "gradient"),
    },
    "2.1": {
        "made on the CPU": ("""
            gamma, beta = m.unbind(1)
            result = torch.zeros(h.shape, dtype=h.dtype)
            result[...] = gamma * h + beta
            return result
            """, "device"),
        "1 + gamma": ("gamma, beta = m.unbind(1)\nreturn (1 + gamma) * h + beta", r"1 \+ gamma"),
        "swapped": ("beta, gamma = m.unbind(1)\nreturn gamma * h + beta", "swapped"),
        "gamma detached": ("return m[:, 0].detach() * h + m[:, 1]", "gradient"),
        "h detached": ("return m[:, 0] * h.detach() + m[:, 1]", "gradient"),
        "no_grad": ("with torch.no_grad():\n    return m[:, 0] * h + m[:, 1]", "gradient"),
        "no axis for the steps": ("return m[:, 0].squeeze() * h + m[:, 1].squeeze()", "axis"),
        "writes into m": ("m[:, 1] += 0.5\nreturn m[:, 0] * h + m[:, 1] - 0.5",
                          "changed"),
    },
    "2.2": {
        "1 + alpha": ("return (1 + m[:, 2]) * h", r"1 \+ alpha"),
        "gamma for alpha": ("return m[:, 0] * h", "alpha"),
        "adds x": ("return h + m[:, 2] * h", "x added"),
        "alpha detached": ("return m[:, 2].detach() * h", "gradient"),
        "branch detached": ("return m[:, 2] * h.detach()", "gradient"),
        "a gate between 0 and 1": ("return m[:, 2].sigmoid() * h", "sigmoid|alpha"),
        "no axis for the steps": ("return m[:, 2].squeeze() * h", "axis"),
    },
    "2.3": {
        "wrong beyond pi": (sinusoid(angles="timestep[:, None].clamp(max=3) * exponents.exp()"),
                            "timesteps? "),
        "turns cut at pi": (sinusoid(
            angles="(timestep[:, None] * exponents.exp()).clamp(max=math.pi)"), "timesteps? "),
        "no gradient": (sinusoid(
            last="self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1)).detach()"), "gradient"),
        "layers under no_grad": ("with torch.no_grad():\n" + textwrap.indent(sinusoid(), "    "),
                                 "gradient"),
        "one rate less": (sinusoid(rates="half"), "rate"),
        "cosines first": (sinusoid(
            last="self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))"), "[Cc]osines first"),
        "layers forgotten": (sinusoid(last="torch.cat([angles.sin(), angles.cos()], dim=-1)"),
                             "layers|mlp"),
        "device ignored": (sinusoid(device="'cpu'"), "device"),
        "six rates for any size": (sinusoid(rates="5"), "rate"),
    },
    "2.4": {
        "the observation detached": (generators(
            observed="self.observation_part(F.mish(o)).detach().repeat_interleave(draws, dim=0)"),
            "gradient"),
        "the encoder never learns": (generators(
            observed="self.observation_part(F.mish(o.detach())).repeat_interleave(draws, dim=0)"),
            "gradient"),
        "tau detached": (generators(timed="self.time_part(F.mish(tau.detach()))"), "gradient"),
        "K from nothing": (generators(draws="2 if len(tau) > len(o) else 1"), "K|draws"),
        "K is the batch": (generators(draws="max(1, len(tau) // 3)"), "K|draws"),
        "draws tiled": (generators(
            observed="self.observation_part(F.mish(o)).repeat(draws, 1)"), "tiled|next to"),
        "no Mish on tau": (generators(timed="self.time_part(tau)"), "[Mm]ish"),
        "Mish in place": (generators(
            observed="self.observation_part(F.mish(o, inplace=True))"
                     ".repeat_interleave(draws, dim=0)"), "changed"),
        "vectors interleaved": ("""
            draws = len(tau) // len(o)
            observed = self.observation_part(F.mish(o)).repeat_interleave(draws, dim=0)
            rows = observed + self.time_part(F.mish(tau))
            return [part.unflatten(1, (-1, self.vectors)).mT[:, :, None]
                    for part in rows.split(self.sizes, dim=1)]
            """, "interleaved|one after"),
        "equal widths": (generators(sizes="sum(self.sizes) // len(self.sizes)"), "width|size"),
    },
    "3.1": {
        "the tanh GELU": (mlp_block("self.dropout(F.gelu(self.up(x), approximate='tanh'))"),
                          "GELU|tanh"),
        "ReLU": (mlp_block("self.dropout(F.relu(self.up(x)))"), "GELU"),
        "dropout on what goes in": (mlp_block("F.gelu(self.up(self.dropout(x)))"), "[Dd]ropout"),
        "dropout after FiLM": (mlp_block(
            "F.gelu(self.up(x))", "self.dropout(self.mechanism.modulate(hidden, modulation))"),
            "[Dd]ropout"),
        "dropout without rescaling": (mlp_block(
            "F.gelu(self.up(x))\nif self.training:\n"
            "    hidden = hidden * (torch.rand_like(hidden) > self.dropout.p)"), "rescal"),
        "dropout on the sum": (mlp_block(
            branch="self.down(hidden)",
            last="self.mechanism.after_norm(self.norm(self.dropout(x + branch)), modulation)"),
            "[Dd]ropout"),
        "dropout of another rate": (mlp_block("F.dropout(F.gelu(self.up(x)), 0.1, self.training)"),
                                    "rate"),
        "the branch detached": (mlp_block(branch="self.dropout(self.down(hidden)).detach()"),
                                "gradient"),
        "the shortcut detached": (mlp_block(
            last="self.mechanism.after_norm(self.norm(x.detach() + branch), modulation)"),
            "gradient"),
        "no shortcut": (mlp_block(
            last="self.mechanism.after_norm(self.norm(branch), modulation)"), "shortcut"),
        "writes into x": (mlp_block(
            last="self.mechanism.after_norm(self.norm(x.add_(branch)), modulation)"),
            "changed"),
    },
    "3.2": {
        "later steps": ("""
            mask = torch.ones(steps, steps, dtype=torch.bool, device=device).triu()
            mask[:in_front, :in_front] = True
            return mask
            """, "[Ll]ater"),
        "not itself": ("""
            mask = torch.ones(steps, steps, dtype=torch.bool, device=device).tril(-1)
            mask[:in_front, :in_front] = True
            return mask
            """, "itself"),
        "tokens are causal": (
            "return torch.ones(steps, steps, dtype=torch.bool, device=device).tril()",
            "tokens|condition"),
        "tokens see actions": ("""
            mask = torch.ones(steps, steps, dtype=torch.bool, device=device).tril()
            mask[:in_front] = True
            return mask
            """, "tokens|condition"),
        "device ignored": ("""
            mask = torch.ones(steps, steps, dtype=torch.bool).tril()
            mask[:in_front, :in_front] = True
            return mask
            """, "device"),
        "numbers": ("""
            mask = torch.ones(steps, steps, device=device).tril()
            mask[:in_front, :in_front] = 1
            return mask
            """, "bool"),
        "two tokens": ("""
            mask = torch.ones(steps, steps, dtype=torch.bool, device=device).tril()
            mask[:min(in_front, 3), :min(in_front, 3)] = True
            return mask
            """, "tokens|condition"),
    },
    "3.3": {
        "dropout on the values": (attention(
            weights="weights", value="F.dropout(value, self.dropout, self.training)"),
            "[Dd]ropout"),
        "dropout on what comes out": (attention(
            weights="weights", last="F.dropout(self.output(mixed), self.dropout, self.training)"),
            "[Dd]ropout"),
        "dropout of another rate": (attention(
            weights="F.dropout(weights, 0.1, self.training)"), "rate"),
        "dropout without rescaling": (attention(
            weights="weights * (torch.rand_like(weights) > self.dropout * self.training)"),
            "rescal"),
        "dropout always": (attention(weights="F.dropout(weights, self.dropout)"), "eval"),
        "the source detached": (attention("source = source.detach()"), "gradient"),
        "the root of D": (attention(size="x.shape[-1]"), "sqrt|root"),
        "the mask upside down": (attention(hidden="mask"), "upside down"),
        "the weights detached": (attention(weights="F.dropout(weights.detach(), self.dropout, "
                                                   "self.training)"), "gradient"),
    },
    "4.1": {
        "more than N angles cut": (joints(
            check="angles = angles[..., :len(lengths)]\n"
                  "if angles.shape[-1] != len(lengths):\n    raise ValueError('angles')"),
            "ValueError|RAISE"),
        "no check": (joints(check=""), "ValueError|RAISE"),
        "detached": (joints(heading="angles.detach().cumsum(-1)"), "gradient"),
        "no_grad": ("with torch.no_grad():\n" + textwrap.indent(joints(), "    "), "gradient"),
        "float32": (joints(dtype="torch.float32"), "float"),
        "absolute angles": (joints(heading="angles"), "before it|absolute"),
        "writes into the angles": (joints(heading="angles.cumsum_(-1)"), "changed"),
        "this base alone": (joints(base="(256.0, -60.0)"), "base"),
    },
    "4.2": {
        "another sign": ("""
            joints = self.joints(angles)
            x, y = (joints[..., -1:, :] - joints[..., :-1, :]).unbind(-1)
            return torch.stack([y, -x], dim=-2)
            """, "sign|way round"),
        "from the next joint": ("""
            joints = self.joints(angles)
            x, y = (joints[..., -1:, :] - joints[..., 1:, :]).unbind(-1)
            return torch.stack([-y, x], dim=-2)
            """, "next"),
        "detached": ("""
            joints = self.joints(angles).detach()
            x, y = (joints[..., -1:, :] - joints[..., :-1, :]).unbind(-1)
            return torch.stack([-y, x], dim=-2)
            """, "gradient"),
        "joints before x and y": ("""
            joints = self.joints(angles)
            x, y = (joints[..., -1:, :] - joints[..., :-1, :]).unbind(-1)
            return torch.stack([-y, x], dim=-1)
            """, "shape|before"),
        "joints before x and y, reshaped": ("""
            joints = self.joints(angles)
            x, y = (joints[..., -1:, :] - joints[..., :-1, :]).unbind(-1)
            return torch.stack([-y, x], dim=-1).reshape(*angles.shape[:-1], 2, -1)
            """, "reshape"),
        "three joints": ("""
            joints = self.joints(angles)
            x, y = (joints[..., 3:4, :] - joints[..., :3, :]).unbind(-1)
            return torch.stack([-y, x], dim=-2)
            """, "three|number of links|arm"),
        "float32": ("""
            joints = self.joints(angles.float())
            x, y = (joints[..., -1:, :] - joints[..., :-1, :]).unbind(-1)
            return torch.stack([-y, x], dim=-2).to(angles.dtype)
            """, "float32"),
    },
    "4.3": {
        "no damping": (step(damping="0"), "[Dd]amping"),
        "damping not squared": (step(damping="DAMPING"), "[Dd]amping.*squared"),
        "the transpose": ("J = self.jacobian(angles)\n"
                          "return (J.mT @ displacement[..., None])[..., 0] / 1e5", "transpose"),
        "the jacobian detached": (step(jacobian="self.jacobian(angles).detach()"), "gradient"),
        "the displacement detached": (step(displacement="displacement.detach()"), "gradient"),
        "a float32 identity": ("""
            J = self.jacobian(angles).float()
            square = J @ J.mT + DAMPING ** 2 * torch.eye(2, device=angles.device)
            return (J.mT @ torch.linalg.solve(square, displacement.float()[..., None]))[..., 0]
            """, "float"),
        "device ignored": (step(device="'cpu'"), "device"),
        "the jacobian of the first pose": (step(jacobian="self.jacobian(angles[:1])"), "pose"),
        "scales the displacement in place": (step(displacement="displacement.mul_(1.0001)"),
                                             "changed"),
    },
    "5.1": {
        "eval alone": ("backbone.eval()", "requires_grad|train"),
        "without the time encoder": ("""
            for name, weight in backbone.named_parameters():
                weight.requires_grad_("time_encoder" in name)
            """, "time encoder"),
        "children alone": ("""
            for module in backbone.children():
                module.requires_grad_(False)
            """, "child|own"),
        "matrices alone": ("""
            for weight in backbone.parameters():
                weight.requires_grad_(weight.dim() < 2)
            """, "bias"),
        "no gradient through it": (
            "backbone.requires_grad_(False)\nbackbone.forward = torch.no_grad()(backbone.forward)",
            "through"),
        "weights at zero": ("backbone.requires_grad_(False)\nfor weight in backbone.parameters():\n"
                            "    weight.zero_()", "changed"),
        "the whole class": ("""
            backbone.requires_grad_(False)
            names = dict(backbone.named_parameters())
            import gc
            for module in gc.get_objects():
                if type(module) is nn.Linear:
                    module.weight.requires_grad_(False)
            """, "condition"),
    },
    "5.2": {
        "the device ignored": (windows(
            ends="torch.as_tensor(demonstrations['episode_ends'])", device="'cpu'"), "device"),
        "the end on the board": (windows(high="ends[-1] - 1"), "episode"),
        "one frame too many": (windows(high="ends[episode, None]"), "last frame|after"),
        "the first frame in the episode before": (windows(right="False"), "episode"),
        "all frames of the file": ("""
            ends = torch.as_tensor(demonstrations["episode_ends"], device=device)
            frame = torch.arange(len(demonstrations["state"]), device=device)
            episode = torch.searchsorted(ends, frame, right=True).clamp(max=len(ends) - 1)
            starts = torch.cat([ends.new_zeros(1), ends])[episode]
            window = frame[:, None] + torch.arange(first, first + length, device=device)
            return window.clamp(starts[:, None], ends[episode, None] - 1)
            """, "file|frames that count"),
        "starts one step before, always": (windows(first="-1"), "first"),
        "sixteen steps, always": ("""
            ends = torch.as_tensor(demonstrations["episode_ends"], device=device)
            frame = torch.arange(int(ends[-1]), device=device)
            episode = torch.searchsorted(ends, frame, right=True)
            starts = torch.cat([ends.new_zeros(1), ends])[episode]
            steps = torch.arange(first, first + (2 if length == 2 else 16), device=device)
            return (frame[:, None] + steps).clamp(starts[:, None], ends[episode, None] - 1)
            """, "length|shape"),
        "writes into the demonstrations": ("""
            ends = torch.as_tensor(demonstrations["episode_ends"], device=device)
            frame = torch.arange(int(ends[-1]), device=device)
            episode = torch.searchsorted(ends, frame, right=True)
            starts = torch.cat([ends.new_zeros(1), ends])[episode]
            window = frame[:, None] + torch.arange(first, first + length, device=device)
            ends -= 1
            return window.clamp(starts[:, None], ends[episode, None])
            """, "changed"),
    },
    "5.3": {
        "the first tensor alone": ("""
            decay = ema_decay(int(num_averaged) - 1, cap)
            averages[0].lerp_(weights[0], 1 - decay)
            """, "first"),
        "counts in the loop": ("""
            for average, weight in zip(averages, weights):
                average.lerp_(weight, 1 - ema_decay(int(num_averaged) - 1, cap))
                num_averaged = num_averaged + 1
            """, "loop|count"),
        "counts in place": ("""
            for average, weight in zip(averages, weights):
                average.lerp_(weight, 1 - ema_decay(int(num_averaged) - 1, cap))
                num_averaged += 1
            """, "loop|count"),
        "of update n": ("""
            decay = ema_decay(int(num_averaged), cap)
            for average, weight in zip(averages, weights):
                average.lerp_(weight, 1 - decay)
            """, "update"),
        "swapped": ("""
            decay = ema_decay(int(num_averaged) - 1, cap)
            for average, weight in zip(averages, weights):
                average.lerp_(weight, decay)
            """, "swapped"),
        "a new tensor": ("""
            decay = ema_decay(int(num_averaged) - 1, cap)
            for average, weight in zip(averages, weights):
                average = decay * average + (1 - decay) * weight
            """, "in place"),
        "a graph that grows": ("""
            def ema_update(cap, averages, weights, num_averaged):
                decay = ema_decay(int(num_averaged) - 1, cap)
                for average, weight in zip(averages, weights):
                    average.lerp_(weight, 1 - decay)
            """, "graph|gradient"),
        "a cap of its own": ("""
            decay = ema_decay(int(num_averaged) - 1, 0.9999)
            for average, weight in zip(averages, weights):
                average.lerp_(weight, 1 - decay)
            """, "cap"),
        "weights changed": ("""
            decay = ema_decay(int(num_averaged) - 1, cap)
            for average, weight in zip(averages, weights):
                average.copy_(weight.mul_(1 - decay).add_(average, alpha=decay))
            """, "changed"),
    },
    "5.4": {
        "o detached": (loss(o="self.conditioning.encode(perceived).detach()"), "gradient"),
        "the prediction without gradient": (loss(
            predicted="self.predict_noise(noisy, timestep, o.detach(), steps)"), "gradient"),
        "the second term detached": (loss(
            more="torch.as_tensor(encoder.auxiliary_loss(perceived)).detach()"), "gradient"),
        "a hundred timesteps, always": (loss(count="100"), "num_timesteps|index"),
        "timestep 0 never": (loss(count="1, self.ddpm.num_timesteps"), "timestep 0|never"),
        "one timestep for all": (loss(
            drawn="(1,)",
            predicted="self.predict_noise(noisy, timestep.expand(len(clean)), o, steps)"),
            "[Oo]ne timestep"),
        "noise that is uniform": (loss(noise="2 * torch.rand_like(clean) - 1"), "normal|noise"),
        "absolute error": (loss(error="F.l1_loss(predicted, noise)"), "square|absolute"),
        "the clean actions predicted": (loss(error="F.mse_loss(predicted, clean)"), "clean|noise"),
        "draws tiled": (loss(
            clean="self.normalise(actions, agent).repeat(self.noise_samples, 1, 1)"),
            "tiled|next to"),
        "actions changed": (loss(
            clean="self.normalise(actions.sub_(0.5), agent)"
                  ".repeat_interleave(self.noise_samples, 0)"), "changed"),
        "this agent alone": ("agent = None\n" + loss(), "agent"),
    },
    "5.5": {
        "start hard-coded": (act(first="1"), "start|first|step early"),
        "eight actions, always": (act(count="8"), "Ta|shape"),
        "NaN in the first row alone": (act(bad="executed[0].isnan().any()"),
                                       "FloatingPointError|RAISE"),
        "NaN in the first action alone": (act(bad="executed[:, 0].isnan().any()"),
                                          "FloatingPointError|RAISE"),
        "all must be NaN": (act(bad="executed.isnan().all()"), "FloatingPointError|RAISE"),
        "no_grad forgotten": ("def act(self, observations, generator=None):"
                              + textwrap.indent(act(), "    "), "no_grad|gradient"),
        "the end of the board hard-coded": (act(low="0", high="512"), "board"),
        "beyond the board": (act(low="-1e6", high="1e6"), "board"),
        "not read": (act(read="torch.as_tensor(observations).float()"), "read"),
        "the generator dropped": (act().replace("observations, generator))", "observations))")
                                  .replace("self.sample(observations, generator)",
                                           "self.sample(observations)"), "generator"),
    },
    "5.6": {
        "the absolute value of each edge": (coverage(
            last="np.abs(area * edge.real).sum((-2, -1)) / BLOCK_AREA"), "absolute|sign"),
        "this goal alone": (coverage(goal="GOAL"), "goal"),
        "the centre of the bar": (coverage(center="0"), "centre|corner"),
        "the shift not turned": (coverage(back="0"), "turn|goal's frame"),
        "not clipped to the edge": (coverage(inside="0, 1"), "clip|edge"),
        "the block's area twice": (coverage(
            last="np.maximum((area * edge.real).sum((-2, -1)), 0) / (2 * BLOCK_AREA)"), "area"),
        "counted points": ("""
            pose, goal = np.asarray(pose, float), np.asarray(goal, float)
            x, y = np.meshgrid(np.arange(-59.5, 60), np.arange(0.5, 120))
            points = (x + 1j * y).ravel()
            points = points[(points.imag < 30) | (abs(points.real) < 15)] - CENTER
            local = points * unit(pose[..., 2] - goal[2])[..., None]
            local = local + (as_complex(pose[..., :2] - goal[:2]) * unit(-goal[2]))[..., None]
            inside = 0
            for (left, top), (right, bottom) in zip(LOW, HIGH):
                inside = inside + ((left <= local.real) & (local.real <= right)
                                   & (top <= local.imag) & (local.imag <= bottom))
            return (inside > 0).mean(-1)
            """, "[Ee]xact|points|counted"),
        "angle as one number": ("""
            pose = np.asarray(pose, float)
            goal = np.asarray(goal, float)
            if pose.ndim == 1:
                pose = pose[None]
            """ + textwrap.indent(coverage().replace(
                "pose, goal = np.asarray(pose, float), np.asarray(goal, float)\n", ""),
                " " * 12), "shape"),
    },
}
