"""From images to features, ranked lists and figures."""
