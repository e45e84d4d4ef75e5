"""What each weight quantizer keeps of a network: the page `bench/QUALITY.md`."""
