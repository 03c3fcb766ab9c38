import os

from django.http import HttpResponse

from guestbook.models import Visit


def page(request):
    Visit.objects.create()
    count = Visit.objects.count()
    return HttpResponse(f"<p>Hello, visitor {count}. I am user {os.getuid()}.</p>\n")
