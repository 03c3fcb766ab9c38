<?php
// Hands a request to upq and returns its reply: launch(["cid" => 501, "net" => [...]]).
function launch(array $request, string $job = "container"): array
{
    $upq = stream_socket_client("unix://" . (getenv("UPQ_SOCKET") ?: "/run/upq/upq.sock"));
    fwrite($upq, json_encode(["submit" => $job, "params" => $request]) . "\n");
    return json_decode(fgets($upq), true);
}
