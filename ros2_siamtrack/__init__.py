"""siamtrack as ROS 2 nodes. Thin: everything that is not ROS lives in `siamtrack`."""
