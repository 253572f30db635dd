"""What updates tell whoever subscribes to it: trainers, routers, dashboards."""

from checkpoint_engine.events.messages import Event, UpdateBegan, UpdateEnded, UpdateFailed
from checkpoint_engine.events.publisher import EventPublisher
from checkpoint_engine.events.subscriber import EventSubscriber

__all__ = ["Event", "EventPublisher", "EventSubscriber", "UpdateBegan", "UpdateEnded", "UpdateFailed"]
