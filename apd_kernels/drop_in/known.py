"""The source of other projects that the adapters were made for, by its fingerprint: see fingerprint.py.

Checked by reading it and by its outputs (tests/apd_kernels/drop_in). A fingerprint is of a function and of the helpers
beside it that its adapter takes the place of.
"""

from __future__ import annotations

KNOWN: dict[str, dict[str, str]] = {
    "transreid.euclidean_dist": {
        "d7d459811946819e": "CLIP-ReID, TransReID",
        "18a37027adc0ab46": "reid-strong-baseline",
    },
    "transreid.cosine_dist": {
        "5b95693e39e1c70e": "CLIP-ReID, TransReID",
    },
    "transreid.hard_example_mining": {
        "79c024e25af6e779": "CLIP-ReID, TransReID, reid-strong-baseline",
    },
    "transreid.TripletLoss.__call__": {
        "df1419f43b3f91a8": "CLIP-ReID, TransReID",
        "85ac7f9d727ba863": "reid-strong-baseline",
    },
    "transreid.SupConLoss.forward": {
        "fb43307c16c04455": "CLIP-ReID",
    },
    "transreid.euclidean_distance": {
        "108b7f496e8f2f05": "CLIP-ReID, TransReID",
    },
    "transreid.cosine_similarity": {
        "c5827ef13cee3bfa": "CLIP-ReID, TransReID",
    },
    "transreid.eval_func": {
        "c24cf6b850c85638": "CLIP-ReID, TransReID",
        "eecf8ccf714fc726": "reid-strong-baseline",
    },
    "transreid.R1_mAP_eval.compute": {
        "9f6998fafc4f6402": "CLIP-ReID, TransReID",
    },
    "transreid.R1_mAP.compute": {
        "bdbedf96937b8eaf": "reid-strong-baseline",
    },
    "transreid.R1_mAP_reranking.compute": {
        "767730bb063ad264": "reid-strong-baseline",
    },
    "transreid.re_ranking": {
        "b64fde9dba01aff1": "CLIP-ReID, TransReID",
        "b1ab900da74bccf5": "reid-strong-baseline",
    },
    "torchreid.TripletLoss.forward": {
        "a39d6f4c8c706660": "deep-person-reid, pypi-torchreid",
    },
    "torchreid.euclidean_squared_distance": {
        "8efbe85cb9d02966": "deep-person-reid, pypi-torchreid",
    },
    "torchreid.cosine_distance": {
        "57d3f903d32e9515": "deep-person-reid, pypi-torchreid",
    },
    "torchreid.evaluate_rank": {
        "86a95fcb9290ddc0": "deep-person-reid, pypi-torchreid",
    },
    "torchreid.Engine._evaluate": {
        "f81eb2bfb812ec6b": "deep-person-reid, pypi-torchreid",
    },
    "torchreid.re_ranking": {
        "993dc6a5afabfb5a": "deep-person-reid, pypi-torchreid",
    },
    "fastreid.euclidean_dist": {
        "50d0b58062614954": "fast-reid, pypi-fastreid",
    },
    "fastreid.cosine_dist": {
        "0eb8e7e5c99a0c5b": "fast-reid, pypi-fastreid",
    },
    "fastreid.triplet_loss": {
        "406009dbd00ac20f": "fast-reid, pypi-fastreid",
    },
    "fastreid.pairwise_circleloss": {
        "0e453a9cffad7d9e": "fast-reid, pypi-fastreid",
    },
    "fastreid.pairwise_cosface": {
        "af1e25f0668d8051": "fast-reid, pypi-fastreid",
    },
    "fastreid.compute_euclidean_distance": {
        "e2769ec6213a0ae5": "fast-reid, pypi-fastreid",
    },
    "fastreid.compute_cosine_distance": {
        "c4e19f04027bf45d": "fast-reid, pypi-fastreid",
    },
    "fastreid.compute_jaccard_distance": {
        "f9c6ec3ecfdace09": "fast-reid, pypi-fastreid",
    },
    "fastreid.build_dist": {
        "3ba8003f53213a0d": "fast-reid, pypi-fastreid",
    },
    "fastreid.re_ranking": {
        "ba2a63fbb436b6cc": "fast-reid, pypi-fastreid",
    },
    "fastreid.aqe": {
        "13f66fdd59590daa": "fast-reid, pypi-fastreid",
    },
    "fastreid.evaluate_rank": {
        "051517685e56417e": "fast-reid, pypi-fastreid",
    },
    "fastreid.evaluate_roc": {
        "1b7ecdcc6255f169": "fast-reid, pypi-fastreid",
    },
    "fastreid.ReidEvaluator.evaluate": {
        "3790be7516803806": "fast-reid, pypi-fastreid",
    },
    "openreid.euclidean_dist": {
        "0d96b9d8167ec65e": "BAU",
    },
    "openreid.cosine_dist": {
        "9141c8d1de146a54": "BAU",
    },
    "openreid.TripletLoss.forward": {
        "cf889e89e41d0399": "BAU",
    },
    "openreid.SoftTripletLoss.forward": {
        "f9b6c72e9fe96e5d": "BAU",
    },
    "openreid.ClusterMemory.forward": {
        "4584e9e2f6a4bc43": "cluster-contrast-reid",
    },
    "openreid.MemoryBank.momentum_update": {
        "0a1828d62a33abf1": "BAU",
    },
    "openreid.cmc": {
        "54fec03a733b8c8f": "BAU, SpCL, cluster-contrast-reid",
    },
    "openreid.mean_ap": {
        "b5056dc91c1bb06d": "BAU, SpCL, cluster-contrast-reid",
    },
    "openreid.Evaluator.evaluate": {
        "9fe151debc876310": "SpCL, cluster-contrast-reid",
        "6996357fdd83f4d5": "BAU",
    },
    "openreid.re_ranking": {
        "993dc6a5afabfb5a": "BAU, SpCL, cluster-contrast-reid",
    },
    "openreid.compute_jaccard_distance": {
        "88a449935594c88b": "BAU, SpCL, cluster-contrast-reid",
    },
}
