"""A Django project in one file that starts runs, shows them and receives FLORA's callbacks.

    pip install django
    export FLORA_API_KEY=sk_live_… FLORA_WEBHOOK_SECRET=whsec_…
    export TRACKER_PUBLIC_URL=https://shop.example.com
    python django_app.py runserver

    curl -d "prompt=garden tools" http://127.0.0.1:8000/orders/17
    curl http://127.0.0.1:8000/orders/17

Beside it, with the same variables, `tracker worker` polls the runs whose callbacks are lost, as a
Celery worker runs beside Django. The views may run in any number of threads and processes.
"""

import os
import sys

from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from tracker.errors import SignatureError, StoreUnavailable, TrackerError
from tracker.sync import Run, Tracker

settings.configure(
    DEBUG="DEBUG" in os.environ,
    SECRET_KEY=os.environ.get("SECRET_KEY", "only for development"),
    ALLOWED_HOSTS=["127.0.0.1", "localhost", "shop.example.com"],
    ROOT_URLCONF=__name__,
)
tracker = Tracker.from_env()  # the first call opens it


@csrf_exempt  # for curl; a page's form sends Django's token
def order(request: HttpRequest, order_id: int) -> JsonResponse:
    """POST starts the order's run, and the same run when it is repeated; GET shows the run."""
    if request.method == "POST":
        try:
            run = tracker.start(
                "icon-pack",
                {"prompt": request.POST.get("prompt", "")},
                idempotency_key=f"order-{order_id}",
                tags={"order": str(order_id)},
            )
        except TrackerError as error:  # its message says what to do
            return JsonResponse({"error": str(error)}, status=502)
        return JsonResponse(shown(run), status=202)
    for run in tracker.runs(tag=f"order={order_id}"):
        return JsonResponse(shown(run))
    return JsonResponse({"error": "this order has no run"}, status=404)


def shown(run: Run) -> dict[str, object]:
    """What a page says about a run."""
    return {
        "run_id": run.run_id,
        "status": run.status,
        "settled": run.settled,
        "cost_usd": run.charged_cost,
        "urls": [output.url for output in run.outputs],
    }


@csrf_exempt
@require_POST
def callback(request: HttpRequest, token: str | None = None) -> HttpResponse:
    """Store a callback of FLORA; 2xx means that it is stored. FLORA repeats it after a 503."""
    try:
        tracker.receive_callback(request.body, request.headers, token=token)
    except SignatureError:
        return HttpResponse(status=401)
    except StoreUnavailable:
        return HttpResponse(status=503, headers={"Retry-After": "5"})
    return HttpResponse(status=204)


urlpatterns = [
    path("orders/<int:order_id>", order),
    path("callbacks/flora", callback),
    path("callbacks/flora/<str:token>", callback),  # each start has its own address
]
application = get_wsgi_application()  # for a server: gunicorn django_app

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
