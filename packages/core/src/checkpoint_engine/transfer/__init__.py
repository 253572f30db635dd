"""Updates: the stages that bring buckets to engine workers, and the watch over them."""
