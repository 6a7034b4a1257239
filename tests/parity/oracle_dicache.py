"""DiCache as its official code runs it, written out for diffusers' models; shares no code with cineray.

From github.com/Bujiazi/DiCache at dd7f0de, with names kept: one counter over all calls, state in lists by
`cnt % num_branches`, means instead of sums, windows that grow to three and shift. Only the model around the
rules is diffusers' (its forward is the specification of what runs before and after the blocks).
"""

# The control flow is the official one: names that are bound on every path that is taken, calls by unpacked state.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportAttributeAccessIssue=false

from types import MethodType

import torch


class OfficialDiCache:
    """Attributes that the official scripts put on the model class."""

    def __init__(self, num_steps, threshold, ret_ratio, clip, num_branches, inclusive=False, flux=False):
        self.num_steps = num_steps * num_branches
        self.thr, self.ret_ratio, self.clip = threshold, ret_ratio, clip
        self.n, self.inclusive, self.flux = num_branches, inclusive, flux
        self.probe_depth = 1
        self.log = []
        self.reset()

    def reset(self):
        self.cnt = 0
        self.acc = [0.0] * self.n
        self.window = [[] for _ in range(self.n)]
        self.probe_window = [[] for _ in range(self.n)]
        self.prev_probe = [None] * self.n

    def run(self, x, probe, rest, everything):
        """x [B,S,D]; probe(x) -> state; rest(state) -> [B,S,D]; everything(x) -> (probe output, [B,S,D])."""
        i = self.cnt % self.n
        if self.flux:
            direct = self.cnt <= int(self.ret_ratio * self.num_steps) or self.cnt == self.num_steps - 1
        else:
            direct = self.cnt < int(self.num_steps * self.ret_ratio)
        skip, gamma = False, None
        if direct:
            if self.flux:
                self.acc[i] = 0
        else:
            state = probe(x)
            test_x = state[0]
            delta_y = (test_x - self.prev_probe[i]).abs().mean() / self.prev_probe[i].abs().mean()
            self.acc[i] += delta_y
            if self.acc[i] <= self.thr if self.inclusive else self.acc[i] < self.thr:
                skip = True
            else:
                self.acc[i] = 0
        if skip:
            if len(self.window[i]) >= 2:
                current = test_x - x
                gamma = (
                    (current - self.probe_window[i][-2]).abs().mean()
                    / (self.probe_window[i][-1] - self.probe_window[i][-2]).abs().mean()
                ).clip(*self.clip)
                out = x + (self.window[i][-2] + gamma * (self.window[i][-1] - self.window[i][-2]))
            else:
                out = x + self.window[i][-1]
            self.prev_probe[i] = test_x
        else:
            if direct:
                test_x, out = everything(x)
            else:
                out = rest(state)
            self.prev_probe[i] = test_x
            if len(self.window[i]) <= 2:
                self.window[i].append(out - x)
                self.probe_window[i].append(test_x - x)
            else:
                self.window[i][-2], self.window[i][-1] = self.window[i][-1], out - x
                self.probe_window[i][-2], self.probe_window[i][-1] = self.probe_window[i][-1], test_x - x
        self.log.append((not skip, None if gamma is None else gamma.item()))
        self.cnt += 1
        if self.cnt >= self.num_steps:
            self.reset()
        return out


def attach_to_wan(transformer, oracle):
    def forward(self, hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image=None,
                return_dict=True, attention_kwargs=None):  # fmt: skip  # noqa: ARG001  # as the pipeline calls it
        b, _, frames, height, width = hidden_states.shape
        pt, ph, pw = self.config.patch_size
        rotary = self.rope(hidden_states)
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        temb, proj, text, image = self.condition_embedder(timestep, encoder_hidden_states, encoder_hidden_states_image)
        proj = proj.unflatten(1, (6, -1))
        if image is not None:
            text = torch.cat([image, text], dim=1)

        def through(x, blocks):
            for block in blocks:
                x = block(x, text, proj, rotary)
            return x

        m = oracle.probe_depth

        def everything(x):
            test_x = through(x, self.blocks[:m])
            return test_x, through(test_x, self.blocks[m:])

        x = oracle.run(
            x, lambda x: (through(x, self.blocks[:m]),), lambda state: through(state[0], self.blocks[m:]), everything
        )
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        x = self.proj_out((self.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
        x = x.reshape(b, frames // pt, height // ph, width // pw, pt, ph, pw, -1)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return (x,)

    transformer.forward = MethodType(forward, transformer)


def attach_to_two_lists(transformer, oracle, text_first):
    """HunyuanVideo and FLUX: dual-stream blocks, then single-stream blocks; taps diffusers' own forward."""
    dual, single = transformer.transformer_blocks, transformer.single_transformer_blocks

    def call(block, x, text, rest):
        args, kwargs = rest
        out = block(x, text, *args, **kwargs) if args else block(hidden_states=x, encoder_hidden_states=text, **kwargs)
        return (out[1], out[0]) if text_first else out

    def split(args, kwargs):
        if args:
            return args[0], args[1], (args[2:], kwargs)
        kwargs = dict(kwargs)
        return kwargs.pop("hidden_states"), kwargs.pop("encoder_hidden_states"), ((), kwargs)

    def pair(x, text):
        return (text, x) if text_first else (x, text)

    kept = {}

    def run_dual(*args, **kwargs):
        x, text, rest = split(args, kwargs)
        kept.update(x=x, text=text, rest=rest)
        return pair(x, text)  # everything happens in run_single, which sees both lists

    def run_single(*args, **kwargs):
        _, _, single_rest = split(args, kwargs)
        m = oracle.probe_depth

        def through(x, text, blocks, rest):
            for block in blocks:
                x, text = call(block, x, text, rest)
            return x, text

        def rest(state):
            state = through(*state, dual[m:], kept["rest"])
            return through(*state, single, single_rest)[0]

        def probe(x):
            return through(x, kept["text"], dual[:m], kept["rest"])

        def everything(x):
            state = probe(x)
            return state[0], rest(state)

        return pair(oracle.run(kept["x"], probe, rest, everything), kept["text"])

    transformer.__dict__["_modules"]["transformer_blocks"] = _Yields(run_dual)
    transformer.__dict__["_modules"]["single_transformer_blocks"] = _Yields(run_single)


class _Yields(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def __iter__(self):
        return iter([self.function])
