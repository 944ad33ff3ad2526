"""Evaluation of trackers on image sequences: readers, one-pass runs, metrics, reports, and OpenCV peers."""
