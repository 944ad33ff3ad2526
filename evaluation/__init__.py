"""Evaluation of trackers on image sequences: readers, the one-pass protocol and metrics, and OpenCV peers."""
