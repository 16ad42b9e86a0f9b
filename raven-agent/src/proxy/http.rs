//! Plain HTTP on a cloud gateway node: routes each request to the node in its `?nodeName=` or Host header. hyper parses
//! and writes the requests, which rules out request smuggling.

use std::{
    convert::Infallible,
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{
    Request, Response, StatusCode, Uri,
    body::{Bytes, Incoming},
    header::{CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, TE, TRAILER, TRANSFER_ENCODING, UPGRADE},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tracing::Instrument;

use super::{
    limits,
    pending::PendingSlot,
    router::{Router, refusal_of},
    stats::Refusal,
    stream::{Account, Stream},
};
use crate::plan::proxy::Target;

type Body = BoxBody<Bytes, hyper::Error>;

/// Headers of one connection, which are not forwarded (RFC 9110 §7.6.1).
const HOP: [HeaderName; 5] = [CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE];

/// Serves one client's connection.
pub(super) async fn serve(router: Router, client: TcpStream, from: IpAddr, slot: PendingSlot) {
    let evicted = slot.evicted.clone();
    // The connection is pending until its first request has been parsed.
    let pending = Mutex::new(Some(slot));
    let service = service_fn(move |request| {
        pending.lock().unwrap_or_else(PoisonError::into_inner).take();
        let router = router.clone();
        async move { Ok::<_, Infallible>(answer(&router, from, request).await) }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    // A client that closes its half has given up, as in Go's servers. With `half_close`, a request to a node that never
    // responds would outlive its client.
    builder.timer(TokioTimer::new()).header_read_timeout(limits::HEAD).half_close(false);
    tokio::select! {
        // hyper answers a client that does not speak HTTP.
        _ = builder.serve_connection(TokioIo::new(client), service) => {}
        () = evicted.cancelled() => {}
    }
}

async fn answer(router: &Router, from: IpAddr, request: Request<Incoming>) -> Response<Body> {
    let (target, port) = match target(router, request.uri(), request.headers().get(HOST)) {
        Ok(found) => found,
        Err((status, refusal, error)) => return refuse(router, status, refusal, &error),
    };
    let stream = Stream { id: router.stats.next_id(), node: target.node.clone(), port };
    let span = stream.span();
    match forward(router, from, &target, stream, request).instrument(span).await {
        Ok(response) => response,
        Err((refusal, error)) => refuse(router, StatusCode::BAD_GATEWAY, refusal, &error),
    }
}

fn refuse(router: &Router, status: StatusCode, refusal: Refusal, error: &str) -> Response<Body> {
    if router.stats.refused(refusal) {
        tracing::warn!(status = status.as_u16(), reason = refusal.as_str(), error, "refused a request");
    }
    let body = Full::new(Bytes::from(format!("raven: {error}\n"))).map_err(|never| match never {}).boxed();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// The node and port that a request is for.
fn target(
    router: &Router,
    uri: &Uri,
    host: Option<&HeaderValue>,
) -> Result<(Target, u16), (StatusCode, Refusal, String)> {
    let no_host = || {
        (
            StatusCode::BAD_REQUEST,
            Refusal::NoName,
            "the request names no node; use Host: NODE:PORT or ?nodeName=NODE".to_owned(),
        )
    };
    let host: Uri = host.and_then(|h| h.to_str().ok()).and_then(|h| h.parse().ok()).ok_or_else(no_host)?;
    let plan = router.plan.borrow();
    let directory = &plan.directory;
    let port = host
        .port_u16()
        .or_else(|| directory.ports.http.first().copied())
        .unwrap_or(raven_api::proxy::KUBELET_READ_ONLY_PORT);
    let found = match node_name(uri) {
        Some(name) => directory.by_name(&name, port),
        None => {
            let name = host.host().map(|h| h.trim_matches(['[', ']']).to_ascii_lowercase()).ok_or_else(no_host)?;
            match name.parse::<IpAddr>() {
                Ok(address) => directory.by_address(address, port),
                Err(_) => directory.by_name(&name, port),
            }
        }
    };
    let target = found.map_err(|e| (StatusCode::NOT_FOUND, refusal_of(&e), e.to_string()))?.clone();
    if !directory.ports.http.contains(&port) {
        let why = format!("port {port} is a TLS port; use https and the https port of the Service");
        return Err((StatusCode::BAD_REQUEST, Refusal::Port, why));
    }
    Ok((target, port))
}

/// The query parameter `nodeName`, as in OpenYurt's Raven.
fn node_name(uri: &Uri) -> Option<String> {
    uri.query()?
        .split('&')
        .find_map(|pair| pair.strip_prefix("nodeName="))
        .filter(|name| !name.is_empty())
        .map(str::to_ascii_lowercase)
}

async fn forward(
    router: &Router,
    from: IpAddr,
    target: &Target,
    stream: Stream,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, (Refusal, String)> {
    let opened = router.open(target, &stream, from).await?;
    let port = stream.port;
    let failed = |e: hyper::Error| {
        (Refusal::Unreachable, format!("the request to node {} on port {port} failed: {e}", target.node))
    };
    let account = Account::open(stream, &router.stats);
    let node = TokioIo::new(account.count(opened.into_io()));
    let (mut sender, connection) = hyper::client::conn::http1::handshake(node).await.map_err(failed)?;
    tokio::spawn(async move { account.close(connection.await.err()) });
    let path = request.uri().path_and_query().map_or("/", |p| p.as_str()).parse();
    *request.uri_mut() = path.map_err(|e| (Refusal::Malformed, format!("invalid path: {e}")))?;
    HOP.iter().for_each(|name| drop(request.headers_mut().remove(name)));
    let mut response = sender.send_request(request).await.map_err(failed)?;
    HOP.iter().for_each(|name| drop(response.headers_mut().remove(name)));
    Ok(response.map(BodyExt::boxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_parameter_names_the_node() {
        let name = |uri: &str| node_name(&uri.parse().expect("a URI"));
        assert_eq!(name("/metrics?nodeName=X-a"), Some("x-a".to_owned()));
        assert_eq!(name("/metrics?a=b&nodeName=x-a&c=d"), Some("x-a".to_owned()));
        assert_eq!(name("/metrics?nodeName="), None);
        assert_eq!(name("/metrics"), None);
    }
}
