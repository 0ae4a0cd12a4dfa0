"""Reinforcement learning's formulas written out once more: float64, plain loops, straight from the papers.

Nothing here imports the package. Responses are lists of real tokens; masks become loops over the tokens they keep.
"""

import math

import numpy as np


def real(mask_row):
    """Positions of the real tokens of one row, in order."""
    return [t for t in range(len(mask_row)) if mask_row[t] > 0]


def kl_term(kind, logp, ref):
    d = float(logp) - float(ref)
    if kind == "k1":
        return d
    if kind == "k2":
        return d * d / 2
    return math.exp(-d) - 1 + d


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max()
    return logits - top - math.log(sum(math.exp(x - top) for x in logits))


def full_kl(logits, ref_logits):
    p, q = log_softmax(logits), log_softmax(ref_logits)
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def adaptive_kl(coef, kl, target, horizon, episodes):
    error = kl / target - 1
    error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
    return coef * (1 + error * episodes / horizon)


def token_rewards(scores, kl, coef, mask):
    out = np.zeros(np.shape(mask))
    for b, row in enumerate(mask):
        where = real(row)
        for t in where:
            out[b, t] = -coef * float(kl[b][t])
        if where:
            out[b, where[-1]] += float(scores[b])
    return out


def gae(rewards, values, mask, gamma, lam):
    """By its definition, a sum over all later deltas, not by the recursion."""
    advantages, returns = np.zeros(np.shape(mask)), np.zeros(np.shape(mask))
    for b, row in enumerate(mask):
        where = real(row)
        r = [float(rewards[b][t]) for t in where]
        v = [float(values[b][t]) for t in where] + [0.0]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(where))]
        for i, t in enumerate(where):
            advantages[b, t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(where)))
            returns[b, t] = advantages[b, t] + v[i]
    return advantages, returns


def reinforce(rewards, values, mask):
    advantages, returns = np.zeros(np.shape(mask)), np.zeros(np.shape(mask))
    for b, row in enumerate(mask):
        where = real(row)
        for i, t in enumerate(where):
            returns[b, t] = sum(float(rewards[b][s]) for s in where[i:])
            advantages[b, t] = returns[b, t] - float(values[b][t])
    return advantages, returns


def whiten(x, mask, shift_mean=True):
    flat = [float(x[b][t]) for b, row in enumerate(mask) for t in real(row)]
    out = np.zeros(np.shape(mask))
    if not flat:
        return out
    mean = sum(flat) / len(flat)
    variance = sum((value - mean) ** 2 for value in flat) / len(flat)
    for b, row in enumerate(mask):
        for t in real(row):
            out[b, t] = (float(x[b][t]) - mean) / math.sqrt(variance + 1e-8) + (0 if shift_mean else mean)
    return out


def rloo(scores, valid):
    out = np.zeros(np.shape(scores))
    for p, row in enumerate(scores):
        for i, score in enumerate(row):
            others = [float(row[j]) for j in range(len(row)) if j != i and valid[p][j]]
            if valid[p][i] and others:
                out[p, i] = float(score) - sum(others) / len(others)
    return out


def grpo(scores, valid, scale=True):
    out = np.zeros(np.shape(scores))
    for p, row in enumerate(scores):
        kept = [float(score) for score, ok in zip(row, valid[p], strict=True) if ok]
        if len(kept) < 2:
            continue
        mean = sum(kept) / len(kept)
        std = math.sqrt(sum((x - mean) ** 2 for x in kept) / (len(kept) - 1))
        for i, score in enumerate(row):
            if valid[p][i]:
                out[p, i] = (float(score) - mean) / ((std + 1e-4) if scale else 1)
    return out


def policy_token(logp, old, advantage, low, high, dual=None):
    """(loss, d loss / d logp, whether a clip set it) of one token. At a tie the unclipped branch is meant."""
    ratio = math.exp(logp - old)
    free = -advantage * ratio
    bound = -advantage * min(max(ratio, 1 - low), 1 + high)
    loss, slope, clipped = (bound, 0.0, True) if bound > free else (free, free, False)
    if dual is not None and advantage < 0 and loss > -dual * advantage:
        return -dual * advantage, 0.0, True
    return loss, slope, clipped


def value_token(value, old, target, clip=None):
    """(loss, d loss / d value, whether the clip set it) of one token."""
    free = (value - target) ** 2
    if clip is None:
        return free / 2, value - target, False
    cut = old + min(max(value - old, -clip), clip)
    bound = (cut - target) ** 2
    if bound > free:
        return bound / 2, (cut - target if cut == value else 0.0), True
    return free / 2, value - target, False


def reduce(per_token, mask, how):
    """(sum, weight)."""
    total, weight = 0.0, 0.0
    for b, row in enumerate(mask):
        values = [float(per_token[b][t]) for t in real(row)]
        if how == "token":
            total, weight = total + sum(values), weight + len(values)
        elif values:
            total, weight = total + sum(values) / len(values), weight + 1
    return total, weight


def explained_variance(values, returns, mask):
    pairs = [(float(values[b][t]), float(returns[b][t])) for b, row in enumerate(mask) for t in real(row)]

    def variance(xs):
        return sum((x - sum(xs) / len(xs)) ** 2 for x in xs) / len(xs)

    return 1 - variance([r - v for v, r in pairs]) / variance([r for _, r in pairs])


def rl_loss(batch, hyper, how):
    """(total, weight) of PPO's whole loss; `batch` has [B, N] arrays by name."""
    mask = batch["mask"]
    shape = np.shape(mask)
    policy, value = np.zeros(shape), np.zeros(shape)
    for b, row in enumerate(mask):
        for t in real(row):
            policy[b, t] = policy_token(
                float(batch["logps"][b][t]),
                float(batch["old_logps"][b][t]),
                float(batch["advantages"][b][t]),
                hyper["clip_low"],
                hyper["clip_high"],
                hyper.get("dual_clip"),
            )[0]
            value[b, t] = value_token(
                float(batch["values"][b][t]),
                float(batch["old_values"][b][t]),
                float(batch["returns"][b][t]),
                hyper.get("value_clip"),
            )[0]
    parts = [reduce(x, mask, how) for x in (policy, value, batch["entropy"], batch["kl"])]
    total = (
        parts[0][0]
        + hyper["value_coef"] * parts[1][0]
        - hyper["entropy_coef"] * parts[2][0]
        + hyper["kl_coef"] * parts[3][0]
    )
    return total, parts[0][1]
