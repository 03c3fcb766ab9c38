"""Everything that differs from place to place comes in the environment."""

import os
import secrets
from urllib.parse import urlsplit

database = urlsplit(os.environ["DATABASE_URL"])

SECRET_KEY = secrets.token_urlsafe()  # nothing is signed that outlives the process
ALLOWED_HOSTS = os.environ.get("ALLOWED_HOSTS", "").split()
INSTALLED_APPS = ["guestbook"]
MIDDLEWARE = ["django.middleware.common.CommonMiddleware"]
ROOT_URLCONF = "hello.urls"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": database.path.lstrip("/"),
        "USER": database.username,
        "PASSWORD": database.password,
        "HOST": database.hostname,
        "PORT": database.port,
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
