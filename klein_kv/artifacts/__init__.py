"""An artifact folder's contract: configuration, signatures, manifests, weights."""
