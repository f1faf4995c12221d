r"""Name the equation that a piece of the course computes, and typeset it as MathML, which browsers draw by themselves.

EQUATIONS maps "file.name" to a source and lines of prose in which formulas stand between dollars, in a small part of
TeX: letters, numbers, `_`, `^`, `{}`, `\frac`, `\sqrt`, `\text`, and the names in SYMBOLS and FUNCTIONS.
"""

import re
from html import escape

from ..errors import BadInput

EQUATIONS: dict[str, tuple[str, list[str]]] = {
    "plain.mask": ("LLaDA, eq. 7", [r"$q(x_t^i = M) = t$", r"$q(x_t^i = x_0^i) = 1 - t$"]),
    "plain.bound": (
        "LLaDA, eq. 3",
        [
            r"$L(\theta) = - \E_{t, x_0, x_t} [ \frac{1}{t} \sum_{i=1}^{L}"
            r" {\text{1}[x_t^i = M]} \log p_\theta (x_0^i | x_t) ]$",
            r"divided by the length $L$, so that it is per token.",
        ],
    ),
    "plain.generate": (
        "LLaDA, algorithm 5",
        [
            r"1. Propose for every hole $i$ of the window the likeliest token, $v_i$.",
            r"2. Be as sure of it as the model is: $c_i = p_\theta (v_i | x)$.",
            r"3. Of $n$ holes, with $k$ steps left, fill the $\lceil n / k \rceil$ surest. The others stay masked.",
            r"4. Again, until the window has no hole; then the next window.",
        ],
    ),
    "model.rotary_angles": ("RoFormer, eq. 15", [r"$\varphi_j = \text{position} · \theta^{-2 j / D}$"]),
    "model.rotate": (
        "RoFormer",
        [r"$(a, b) \to (a \cos \varphi - b \sin \varphi, \; b \cos \varphi + a \sin \varphi)$"],
    ),
    "model.attend": ("Transformer, eq. 1", [r"$\softmax ( \frac{q k^\top}{\sqrt{D}} ) v$"]),
    "model.MLP": (
        "SwiGLU, eq. 6",
        [r"$y = W_{\text{down}} ( \silu (W_{\text{gate}} x) \odot W_{\text{up}} x )$"],
    ),
    "model.MoE": (
        "Mixture of experts",
        [
            r"$y = \sum_{e \in \text{chosen}} a_e \, \SwiGLU_e (x) + \SwiGLU_{\text{shared}} (x)$",
            r"The shared expert is left out where a model has none, as LLaDA-MoE.",
        ],
    ),
    "model.MoE.route": (
        "LLaDA-MoE, and LLaDA2 below",
        [
            r"$a_e = \softmax (z)_e$",
            r"$a_e = 2.5 \frac{\sigmoid (z_e)}{\sum_{j \in \text{chosen}} \sigmoid (z_j)}$",
            r"LLaDA2 chooses by $\sigmoid (z_e) + b_e$, with a bias $b_e$.",
        ],
    ),
    "model.Layer": (
        "Pre-norm Transformer",
        [r"$x \leftarrow x + W_o \attn (\norm (x))$", r"$x \leftarrow x + \ffn (\norm (x))$"],
    ),
    "model.LLaDA": (
        "LLaDA, eq. 11",
        [
            r"$p(x_0^i | x_t) = p(x_0^i | x_t^{UM})$",
            r"The best prediction depends on the tokens that are not masked, $x_t^{UM}$, and not on $t$.",
        ],
    ),
    "diffusion.sample_t": ("Stratified levels", [r"$t_i = 1 - \frac{i + u_i}{n}, \quad u_i \sim U(0, 1)$"]),
    "diffusion.bernoulli": (
        "LLaDA, eq. 7 and 12",
        [r"$q(x_t^i = M) = t$", r"$- \log p_\theta (x_0) \le \E_{t, x_t} [ \frac{1}{t} \sum_{i: x_t^i = M} \CE_i ]$"],
    ),
    "diffusion.exact_count": (
        "LLaDA, eq. 14",
        [
            r"$- \log p_\theta (x_0) \le \E_{l, x_l} [ \frac{L}{l} \sum_{i: x_l^i = M} \CE_i ]$",
            r"with $l \sim U\{1 .. L\}$, and $x_l$ any of the ways to mask $l$ tokens, all equally likely.",
        ],
    ),
    "diffusion.nll_bound": (
        "One sample of the bound",
        [r"$b(x_0) = w \sum_{i: x_t^i = M} \CE_i$", r"$\CE_i = - \log p_\theta (x_0^i | x_t)$"],
    ),
    "diffusion.pretraining_loss": ("LLaDA, eq. 3", [r"$L(\theta) = \frac{1}{L} \E_{x_0} [ b(x_0) ]$"]),
    "strategies.Guided": ("LLaDA, eq. 16", [r"$l = l_c + w (l_c - l_u) = (1 + w) l_c - w l_u$"]),
    "strategies.gumbel_argmax": (
        "The Gumbel-max trick",
        [r"$\argmax_v (l_v + T g_v)$", r"$g_v = - \log (- \log u_v), \quad u_v \sim U(0, 1)$"],
    ),
    "strategies.probability": (
        "LLaDA, algorithm 5",
        [r"$c_i = p_\theta (v_i | x)$ for a drawn token $v_i$"],
    ),
    "strategies.chance": ("LLaDA, algorithm 4", [r"$c_i \sim U(0, 1)$"]),
    "strategies.Quota.due": (
        "LLaDA, algorithms 4 and 5",
        [r"$\lceil \frac{n}{k} \rceil$ of $n$ holes, with $k$ steps left"],
    ),
    "sampler.fill": (
        "LLaDA, algorithms 4 and 5: one step",
        [
            r"1. Ask: logits for every hole $i$ of the window.",
            r"2. Draw: a token $v_i$ for each; at $T = 0$ the likeliest.",
            r"3. Score: $c_i$, the probability of $v_i$ (algorithm 5), or a random number (4).",
            r"4. Commit: the $\lceil n / k \rceil$ highest of $n$ scores, with $k$ steps left. The others stay masked.",
        ],
    ),
    "train.Pretraining": (
        "LLaDA, eq. 3",
        [r"$L(\theta) = \frac{1}{L} \E_{l, x_0, x_l} [ \frac{L}{l} \sum_{i: x_l^i = M} \CE_i ]$"],
    ),
    "train.rate": ("Warm up, stay, decay", [r"$\min (1, \; \frac{\tau}{w}, \; \frac{1 - \tau}{d})$"]),
}

SYMBOLS = {
    "theta": "θ", "varphi": "φ", "sigma": "σ", "tau": "τ", "E": "𝔼", "le": "≤", "to": "→", "leftarrow": "←", "in": "∈",
    "sim": "∼", "odot": "⊙", "sum": "∑", "lceil": "⌈", "rceil": "⌉", "top": "⊤", "{": "{", "}": "}",
}  # fmt: skip
FUNCTIONS = ("log", "cos", "sin", "min", "argmax", "softmax", "sigmoid", "silu", "SwiGLU", "attn", "ffn", "norm", "CE")
SPACES = {"quad": "1em", ";": ".28em", ",": ".17em"}
WIDE = ("∑", "arg max")  # what stands above and below them, not beside
TOKEN = re.compile(r"\\text\{[^}]*\}|\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\.\.|\S")


def mathml(tex: str, display: bool = False) -> str:
    """Typeset a formula: x_0 -> <math><msub><mi>x</mi><mn>0</mn></msub></math>. Raises BadInput for what it lacks."""
    tokens = TOKEN.findall(tex)[::-1]
    found = sequence(tokens)
    if tokens:
        raise BadInput(f"formula: expected as many opening as closing braces, got {tex!r}; leave one out")
    return f"<math{' display=block' if display else ''}>{found}</math>"


def sequence(tokens: list[str]) -> str:
    """Take tokens from the end of the list up to a closing brace, and typeset them."""
    out = []
    while tokens and tokens[-1] != "}":
        base, marks = atom(tokens), {}
        while tokens and tokens[-1] in ("_", "^"):
            mark = tokens.pop()
            marks[mark] = atom(tokens)
        if marks:
            low, high = ("munder", "mover") if any(wide in base for wide in WIDE) else ("msub", "msup")
            name = low * ("_" in marks) + high.removeprefix("m" * ("_" in marks)) * ("^" in marks)
            base = f"<{name}>{base}{marks.get('_', '')}{marks.get('^', '')}</{name}>"
        out.append(base)
    return "".join(out)


def atom(tokens: list[str]) -> str:
    """Take one symbol, group, fraction or root, and typeset it."""
    token = tokens.pop()
    name = token.removeprefix("\\")
    if token == "{":
        inside = sequence(tokens)
        tokens.pop()
        return f"<mrow>{inside}</mrow>"
    if token == "\\frac":
        return f"<mfrac>{atom(tokens)}{atom(tokens)}</mfrac>"
    if token == "\\sqrt":
        return f"<msqrt>{atom(tokens)}</msqrt>"
    if token.startswith("\\text{"):
        return f"<mtext>{escape(token[6:-1])}</mtext>"
    if name in SPACES and name != token:
        return f'<mspace width="{SPACES[name]}"/>'
    if name in FUNCTIONS and name != token:
        return f"<mi>{name.replace('argmax', 'arg max')}</mi>" + '<mspace width=".12em"/>' * name.islower()
    if name != token and name not in SYMBOLS:
        raise BadInput(f"formula: expected one of {', '.join(SYMBOLS)}, got {name!r}; add it to the table")
    symbol = SYMBOLS.get(name, name) if name != token else token.replace("-", "−").replace("*", "⊙")
    if symbol[0].isdigit():
        return f"<mn>{symbol}</mn>"
    if symbol.isalpha():
        return f"<mi>{symbol}</mi>"
    return f"""<mo{' stretchy="false"' if symbol in "()|" else ""}>{escape(symbol)}</mo>"""
