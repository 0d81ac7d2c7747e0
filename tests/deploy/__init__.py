"""What is deployed beside the tracker: dashboards, alerts, and the pages that describe them."""
