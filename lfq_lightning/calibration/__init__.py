"""What calibrates one block after another: streams of activations, blocks on the bench, solving, precision."""
