from django.urls import path
from guestbook.views import page

urlpatterns = [path("", page)]
