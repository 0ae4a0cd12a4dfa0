"""PPO on a bigram model in plain float64 NumPy: loops, and every derivative by hand. Nothing here imports JAX.

The model: the logits after token x are `rmsnorm(E[x]) g W / temperature`, a value is `rmsnorm(E'[x]) g' w`. A decoder
whose blocks add nothing to the residual stream is exactly this.
"""

import math
from dataclasses import dataclass

import numpy as np

from tests.objectives import rl_reference as formulas


@dataclass(frozen=True)
class Settings:
    """What varies between the comparisons; the names are those of `PpoSpec` and `UpdateConfig`."""

    algorithm: str = "ppo"
    kl_estimator: str = "k1"
    kl_place: str = "reward"
    normalize: str = "token"
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    samples: int = 1

    @property
    def has_values(self):
        return self.algorithm in ("ppo", "reinforce")


# ---- the model -------------------------------------------------------------------------------------------------


def normed(params, token, eps):
    """(state of the next token, what its derivative needs)."""
    e = params["embedding"][token]
    scale = 1 / math.sqrt((e * e).mean() + eps)
    return e * scale * params["scale"], (token, e, scale)


def back_through_norm(params, grads, saved, dh):
    token, e, scale = saved
    grads["scale"] += dh * e * scale
    inner = (dh * params["scale"] * e).sum()
    grads["embedding"][token] += params["scale"] * dh * scale - e * scale**3 * inner / len(e)


def distribution(params, token, temperature, eps):
    """(log-probs of all next tokens, state, what the norm saved)."""
    h, saved = normed(params, token, eps)
    return formulas.log_softmax(h @ params["head"] / temperature), h, saved


def value_of(params, token, eps):
    h, saved = normed(params, token, eps)
    return float(h @ params["score"]), h, saved


# ---- an iteration ----------------------------------------------------------------------------------------------


class Ppo:
    """Parameters {"policy": {...}, "value": {...}} in float64, Adam's moments, and one method per step of PPO."""

    def __init__(self, params, reference, settings, hyper, eps):
        self.params, self.reference = params, reference
        self.settings, self.hyper, self.eps = settings, hyper, eps
        self.m, self.v = (
            {p: {k: np.zeros_like(x) for k, x in params[p].items()} for p in params} for _ in range(2)
        )
        self.count = 0

    def iteration(self, rows, scores, order):
        """Rows: (prompt, response, ended) lists of ids. order: updates of micro-batches of row numbers, -1 for none.

        Returns:
          Metrics by name, for what the comparison looks at.
        """
        old = self.experience(rows, scores)
        sums, norms = {}, []
        for minibatch in order:
            kept = [row for micro in minibatch for row in micro if row >= 0]
            grads, weight = self.gradient(old, kept, sums)
            norms.append(self.adam_step(grads, weight))
        tokens = sum(len(response) for _, response, _ in rows)
        kl_sum = [sum(x) for x in old["kl"]]
        coef = self.hyper["kl_coef"] if self.settings.kl_place == "reward" else 0.0
        metrics = {name: total / count for name, (total, count) in sums.items()}
        return metrics | {
            "grad_norm": np.mean(norms),
            "objective/kl": np.mean(kl_sum),
            "objective/non_score_reward": np.mean([-coef * x for x in kl_sum]),
            "objective/scores": np.mean(old["scores"]),
            "objective/rlhf_reward": np.mean(
                [s - coef * x for s, x in zip(old["scores"], kl_sum, strict=True)]
            ),
            "val/num_eos_tokens": sum(ended for *_, ended in rows),
            "response_length/mean": (tokens - sum(ended for *_, ended in rows)) / len(rows),
        }

    def experience(self, rows, scores):
        """What the policy, the reference and the values said when the rows were drawn; advantages and returns."""
        hyper, place = self.hyper, self.settings.kl_place
        width = max(len(response) for _, response, _ in rows)
        shape = (len(rows), width)
        mask, logps, values, kl = (np.zeros(shape) for _ in range(4))
        contexts = []
        for b, (prompt, response, _) in enumerate(rows):
            before = [prompt[-1], *response[:-1]]
            contexts.append(list(zip(before, response, strict=True)))
            for t, (context, token) in enumerate(contexts[-1]):
                mine = distribution(self.params["policy"], context, hyper["temperature"], self.eps)[0]
                theirs = distribution(self.reference, context, hyper["temperature"], self.eps)[0]
                mask[b, t], logps[b, t] = 1, mine[token]
                if self.settings.kl_estimator == "full":
                    kl[b, t] = formulas.full_kl(mine, theirs)
                else:
                    kl[b, t] = formulas.kl_term(self.settings.kl_estimator, mine[token], theirs[token])
                if self.settings.has_values:
                    values[b, t] = value_of(self.params["value"], context, self.eps)[0]
        limit = hyper["reward_clip"]
        shaped = [
            min(max(score, -limit), limit) - (0 if ended else hyper["missing_eos_penalty"])
            for score, (*_, ended) in zip(scores, rows, strict=True)
        ]
        rewards = formulas.token_rewards(shaped, kl, hyper["kl_coef"] if place == "reward" else 0.0, mask)
        advantages, returns = self.advantages(rewards, values, mask)
        return {
            "contexts": contexts,
            "mask": mask,
            "logps": logps,
            "values": values,
            "kl": kl,
            "scores": shaped,
            "advantages": advantages,
            "returns": returns,
        }

    def advantages(self, rewards, values, mask):
        settings, hyper = self.settings, self.hyper
        returns = np.zeros_like(rewards)
        if settings.algorithm == "ppo":
            if settings.whiten_rewards:
                rewards = formulas.whiten(rewards, mask, shift_mean=False)
            advantages, returns = formulas.gae(rewards, values, mask, hyper["gamma"], hyper["lam"])
        elif settings.algorithm == "reinforce":
            advantages, returns = formulas.reinforce(rewards, values, mask)
        else:
            whole = rewards.sum(1).reshape(-1, settings.samples)
            grouped = formulas.rloo if settings.algorithm == "rloo" else formulas.grpo
            advantages = grouped(whole, np.ones(whole.shape, bool)).reshape(-1)[:, None] * mask
        if settings.whiten_advantages and settings.algorithm != "grpo":
            advantages = formulas.whiten(advantages, mask)
        return advantages, returns

    def gradient(self, old, kept, sums):
        """(gradient of the summed loss, what it is divided by) of a minibatch; metric sums are added to `sums`."""
        settings, hyper = self.settings, self.hyper
        grads = {p: {k: np.zeros_like(x) for k, x in tree.items()} for p, tree in self.params.items()}
        weight = 0.0
        for b in kept:
            tokens = len(old["contexts"][b])
            share = 1.0 if settings.normalize == "token" else 1.0 / tokens
            weight += tokens if settings.normalize == "token" else 1.0
            of = tokens if settings.normalize == "token" else 1.0
            for t, (context, token) in enumerate(old["contexts"][b]):
                found = self.policy_token(grads["policy"], old, b, t, context, token, share)
                if settings.has_values:
                    found |= self.value_token(grads["value"], old, b, t, context, share)
                for name, x in found.items():
                    loss = name.startswith("loss/")
                    total, count = sums.get(name, (0.0, 0.0))
                    each = of / tokens if loss else 1.0
                    sums[name] = (total + (share if loss else 1.0) * x, count + each)
        assert set(hyper) >= {"clip_low", "clip_high", "value_coef", "entropy_coef"}
        return grads, weight

    def policy_token(self, grads, old, b, t, context, token, share):
        """Adds the gradient of one token's policy loss, entropy bonus and KL term; returns its metrics."""
        settings, hyper, params = self.settings, self.hyper, self.params["policy"]
        logp, h, saved = distribution(params, context, hyper["temperature"], self.eps)
        p = np.exp(logp)
        hot = np.eye(len(p))[token]
        advantage, before = old["advantages"][b, t], old["logps"][b, t]
        ratio = math.exp(logp[token] - before)
        if settings.algorithm in ("ppo", "grpo"):
            bounds = hyper["clip_low"], hyper["clip_high"], hyper.get("dual_clip")
            loss, slope, clipped = formulas.policy_token(logp[token], before, advantage, *bounds)
        else:
            loss, slope, clipped = -advantage * logp[token], -advantage, False
        entropy = -(p * logp).sum()
        d_logits = slope * (hot - p)
        d_logits += (
            hyper["entropy_coef"] * p * (logp + entropy)
        )  # minus the entropy's derivative, -p (log p + H)
        metrics = {
            "loss/policy_avg": loss,
            "policy/entropy_avg": entropy,
            "policy/approxkl_avg": (logp[token] - before) ** 2 / 2,
            "policy/clipfrac_avg": clipped,
            "val/ratio": ratio,
            "val/ratio_var": (ratio - 1) ** 2,
        }
        if settings.kl_place == "loss":
            theirs = distribution(self.reference, context, hyper["temperature"], self.eps)[0]
            d = logp[token] - theirs[token]
            if settings.kl_estimator == "full":
                kl = formulas.full_kl(logp, theirs)
                d_kl = p * (logp - theirs - kl)
            else:
                kl = formulas.kl_term(settings.kl_estimator, logp[token], theirs[token])
                d_kl = {"k1": 1.0, "k2": d, "k3": 1 - math.exp(-d)}[settings.kl_estimator] * (hot - p)
            d_logits += hyper["kl_coef"] * d_kl
            metrics["loss/kl_avg"] = kl
        d_logits *= share / hyper["temperature"]
        grads["head"] += np.outer(h, d_logits)
        back_through_norm(params, grads, saved, params["head"] @ d_logits)
        return metrics

    def value_token(self, grads, old, b, t, context, share):
        params, clip = self.params["value"], self.hyper["value_clip"]
        clip = None if self.settings.algorithm == "reinforce" else clip
        value, h, saved = value_of(params, context, self.eps)
        loss, slope, clipped = formulas.value_token(value, old["values"][b, t], old["returns"][b, t], clip)
        slope *= self.hyper["value_coef"] * share
        grads["score"] += slope * h
        back_through_norm(params, grads, saved, slope * params["score"])
        return {"loss/value_avg": loss, "val/clipfrac_avg": clipped}

    def adam_step(self, grads, weight):
        """Divide, clip the global norm, Adam with decoupled decay (not of scales); returns the norm before clipping."""
        hyper = self.hyper
        self.count += 1
        norm = math.sqrt(sum((g**2).sum() for tree in grads.values() for g in tree.values())) / weight
        shrink = min(1.0, hyper["clip_norm"] / norm)
        for part, tree in grads.items():
            for name, g in tree.items():
                g = g / weight * shrink
                m, v = self.m[part][name], self.v[part][name]
                m += (1 - hyper["b1"]) * (g - m)
                v += (1 - hyper["b2"]) * (g * g - v)
                m_hat, v_hat = m / (1 - hyper["b1"] ** self.count), v / (1 - hyper["b2"] ** self.count)
                decay = 0.0 if name == "scale" else hyper["weight_decay"]
                x = self.params[part][name]
                x -= hyper["learning_rate"] * (m_hat / (np.sqrt(v_hat) + hyper["adam_eps"]) + decay * x)
        return norm
