"""Which files of ``golden/`` are compared where."""

# Other operations: ranking, re-ranking, query expansion; and a cross-entropy of class scores, which has no distance.
OTHERS = (
    r"(aqe|cmc|mean_ap|evaluate(_cy|_rank|_roc)?|eval_(func|cuhk03)|R1_mAP_eval|AccuracyCalculator|re_ranking"
    r"|compute_jaccard_distance|CrossEntropyLabelSmooth)"
)
