"""What `test_use_in_s3prl.py` does in a process that sees s3prl."""

import sys

import torch
import use_in_s3prl  # noqa: F401  (adds the entries)
from s3prl.nn import Featurizer, S3PRLUpstream
from s3prl.upstream.interfaces import Featurizer as DownstreamFeaturizer


def main(output: str, inputs: str, *directories: str) -> None:
    """Writes what s3prl's interfaces make of two clips, for each model."""
    batch, results = torch.load(inputs), {}
    for directory in directories:
        upstream = S3PRLUpstream("skill_student", path_or_url=directory).eval()
        featurizer = Featurizer(upstream)
        downstream_featurizer = DownstreamFeaturizer(upstream.upstream, upstream_device="cpu")
        with torch.no_grad():
            hidden_states, lengths = upstream(batch["wavs"], batch["lengths"])
            weighted_sum, _ = featurizer(hidden_states, lengths)
            features = upstream.upstream(batch["clips"])
            unpadded = downstream_featurizer(batch["clips"], features)
            alone = [upstream.upstream([clip])["hidden_states"] for clip in batch["clips"]]
            unmasked = S3PRLUpstream("skill_student", directory, extra_conf={"masked_group_norm": False}).eval()
            unmasked_states, _ = unmasked(batch["wavs"], batch["lengths"])
        upstream.train()
        results[directory] = {
            "hidden_states": torch.stack(hidden_states),
            "lengths": torch.stack(lengths),
            "weighted_sum": weighted_sum,
            "features": torch.stack(features["hidden_states"]),
            "last_hidden_state": features["last_hidden_state"],
            "unpadded": unpadded,
            "alone": [torch.stack(states) for states in alone],
            "unmasked": torch.stack(unmasked_states),
            "downsample_rates": upstream.downsample_rates,
            "num_in_training": len(upstream(batch["wavs"], batch["lengths"])[0]),
        }
    torch.save(results, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
