//! Plain HTTP on a cloud gateway node: each request goes to the node that its `?nodeName=` or its Host header names. hyper reads and
//! writes the requests, so that what one proxy takes for one request is not two for the next.

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

use super::{
    entrance::{Entrance, refusal_of},
    limits,
    plan::Target,
    stats::Refusal,
    stream::{Account, Stream},
    waiting::Place,
};

type Body = BoxBody<Bytes, hyper::Error>;

/// Headers that speak of one connection, not of the request (RFC 9110 §7.6.1).
const HOP: [HeaderName; 5] = [CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE];

/// Serves one client's connection.
pub(super) async fn serve(entrance: Entrance, client: TcpStream, place: Place) {
    let over = place.over.clone();
    // Until it has said what it wants, once.
    let undecided = Mutex::new(Some(place));
    let service = service_fn(move |request| {
        undecided.lock().unwrap_or_else(PoisonError::into_inner).take();
        let entrance = entrance.clone();
        async move { Ok::<_, Infallible>(answer(&entrance, request).await) }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    // A client that ends its half has lost interest, as Go's servers have it, too: with `half_close` a node that never answers would be
    // waited for long after the last client has given up.
    builder.timer(TokioTimer::new()).header_read_timeout(limits::HEAD).half_close(false);
    tokio::select! {
        // A client that goes away, or speaks no HTTP, has been told by hyper.
        _ = builder.serve_connection(TokioIo::new(client), service) => {}
        () = over.cancelled() => {}
    }
}

async fn answer(entrance: &Entrance, request: Request<Incoming>) -> Response<Body> {
    let wanted = match wanted(entrance, request.uri(), request.headers().get(HOST)) {
        Ok(wanted) => wanted,
        Err((status, refusal, why)) => return refuse(entrance, status, refusal, &why),
    };
    match forward(entrance, wanted, request).await {
        Ok(response) => response,
        Err((refusal, why)) => refuse(entrance, StatusCode::BAD_GATEWAY, refusal, &why),
    }
}

fn refuse(entrance: &Entrance, status: StatusCode, refusal: Refusal, why: &str) -> Response<Body> {
    if entrance.stats.refused(refusal) {
        tracing::warn!(%status, ?refusal, "refused: {why}");
    }
    let body = Full::new(Bytes::from(format!("raven: {why}\n"))).map_err(|never| match never {}).boxed();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

type Unwanted = (StatusCode, Refusal, String);

/// The node and port that a request is for.
fn wanted(entrance: &Entrance, uri: &Uri, host: Option<&HeaderValue>) -> Result<(Target, u16), Unwanted> {
    let no_host = || (StatusCode::BAD_REQUEST, Refusal::NoName, "name the node: by Host: NODE:PORT, or by ?nodeName=NODE".to_owned());
    let host: Uri = host.and_then(|h| h.to_str().ok()).and_then(|h| h.parse().ok()).ok_or_else(no_host)?;
    let plan = entrance.plan.borrow();
    let directory = &plan.directory;
    let port = host.port_u16().or_else(|| directory.ports.http.first().copied()).unwrap_or(raven_api::proxy::KUBELET_READ_ONLY_PORT);
    let found = match named(uri) {
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
        let why = format!("port {port} speaks TLS: use https, and the Service's https port");
        return Err((StatusCode::BAD_REQUEST, Refusal::Port, why));
    }
    Ok((target, port))
}

/// `nodeName` of the query, as upstream has it.
fn named(uri: &Uri) -> Option<String> {
    uri.query()?.split('&').find_map(|pair| pair.strip_prefix("nodeName=")).filter(|name| !name.is_empty()).map(str::to_ascii_lowercase)
}

async fn forward(
    entrance: &Entrance,
    (target, port): (Target, u16),
    mut request: Request<Incoming>,
) -> Result<Response<Body>, (Refusal, String)> {
    let stream = Stream { id: entrance.stats.next_id(), node: target.node.clone(), port };
    let way = entrance.open(&target, &stream).await?;
    let failed = |e: hyper::Error| (Refusal::Unreachable, format!("node {} on port {port}: {e}", target.node));
    let account = Account::open(stream, &entrance.stats);
    let node = TokioIo::new(account.count(way.into_bytes()));
    let (mut sender, connection) = hyper::client::conn::http1::handshake(node).await.map_err(failed)?;
    tokio::spawn(async move { account.close(connection.await.err()) });
    let path = request.uri().path_and_query().map_or("/", |p| p.as_str()).parse();
    *request.uri_mut() = path.map_err(|e| (Refusal::Malformed, format!("the request's path: {e}")))?;
    HOP.iter().for_each(|name| drop(request.headers_mut().remove(name)));
    let mut response = sender.send_request(request).await.map_err(failed)?;
    HOP.iter().for_each(|name| drop(response.headers_mut().remove(name)));
    Ok(response.map(BodyExt::boxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_named_by_the_query() {
        let name = |uri: &str| named(&uri.parse().expect("a URI"));
        assert_eq!(name("/metrics?nodeName=X-a"), Some("x-a".to_owned()));
        assert_eq!(name("/metrics?a=b&nodeName=x-a&c=d"), Some("x-a".to_owned()));
        assert_eq!(name("/metrics?nodeName="), None);
        assert_eq!(name("/metrics"), None);
    }
}
