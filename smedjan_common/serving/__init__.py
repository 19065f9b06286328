"""A trained model over HTTP, in OpenAI's shape: `smedjan serve`.

Nothing here knows a framework: requests go to inference/service.py, whose one thread owns the device. Only app.py, guard.py, and
server.py need the optional packages starlette and uvicorn; nothing imports those but the command.
"""
