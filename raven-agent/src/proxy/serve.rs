//! The edge's half of a tunnel: answers `CONNECT node:port` on a connection that it dialled itself. It connects to listed ports of
//! nodes of its own pool, whatever it is asked.

use std::{convert::Infallible, sync::Arc};

use http_body_util::Empty;
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header::HeaderValue, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::watch,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    limits,
    plan::Plan,
    stats::{Refusal, Stats, TunnelStats},
    stream::{self, Stream},
};

/// Header with a stream's id.
pub(super) const STREAM_HEADER: &str = "raven-stream";
/// What the cloud's side asks for to know how long an answer takes.
pub(super) const PROBE_URI: &str = "http://raven/";
/// Header with the reason of a refusal, in words.
pub(super) const REASON_HEADER: &str = "raven-reason";

type Answer = Response<Empty<hyper::body::Bytes>>;

/// What is needed to answer.
#[derive(Clone)]
pub(crate) struct Edge {
    pub(crate) plan: watch::Receiver<Arc<Plan>>,
    pub(crate) stats: Stats,
}

/// Serves a tunnel until it ends; told to retire, it takes no new streams and ends with its last one.
pub(crate) async fn serve<S>(tunnel: S, edge: Edge, stats: Arc<TunnelStats>, retire: CancellationToken) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| {
        let (edge, stats) = (edge.clone(), stats.clone());
        async move { Ok::<_, Infallible>(answer(request, edge, stats).await) }
    });
    let mut connection = std::pin::pin!(limits::server().serve_connection(TokioIo::new(tunnel), service));
    tokio::select! {
        ended = &mut connection => return ended,
        () = retire.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

async fn answer(request: Request<Incoming>, edge: Edge, tunnel: Arc<TunnelStats>) -> Answer {
    if request.method() == Method::OPTIONS {
        return Response::new(Empty::new());
    }
    match connect(&request, &edge).await {
        Ok((stream, node)) => {
            // HTTP/2 has let no more through than it may.
            let place = tunnel.take_place(u32::MAX);
            tokio::spawn(async move {
                let _place = place;
                match hyper::upgrade::on(request).await {
                    // Seen from here the tunnel is the client.
                    Ok(tunnel) => stream::carry(stream, TokioIo::new(tunnel), node, &[], &edge.stats).await,
                    Err(e) => tracing::debug!(%stream, "the tunnel ended before the stream began: {e}"),
                }
            });
            Response::new(Empty::new())
        }
        Err((status, refusal, reason)) => {
            if edge.stats.refused(refusal) {
                tracing::warn!(authority = ?request.uri().authority(), ?refusal, "refused: {reason}");
            }
            refused(status, &reason)
        }
    }
}

fn refused(status: StatusCode, reason: &str) -> Answer {
    let mut response = Response::new(Empty::new());
    *response.status_mut() = status;
    if let Ok(reason) = HeaderValue::from_str(reason) {
        response.headers_mut().insert(REASON_HEADER, reason);
    }
    response
}

type Refused = (StatusCode, Refusal, String);

async fn connect(request: &Request<Incoming>, edge: &Edge) -> Result<(Stream, TcpStream), Refused> {
    let authority = request.uri().authority().filter(|_| request.method() == Method::CONNECT);
    let Some((node, port)) = authority.and_then(|a| Some((a.host(), a.port_u16()?))) else {
        return Err((StatusCode::BAD_REQUEST, Refusal::Malformed, "expected CONNECT node:port".to_owned()));
    };
    let address = {
        let plan = edge.plan.borrow();
        let target = plan.directory.by_name(node, port).map_err(|e| (StatusCode::FORBIDDEN, Refusal::Unknown, e.to_string()))?;
        if target.pool != plan.directory.own_pool {
            let reason = format!("node {node} belongs to Gateway {}, not to this one", target.pool);
            return Err((StatusCode::FORBIDDEN, Refusal::Unknown, reason));
        }
        target.address
    };
    let id = request.headers().get(STREAM_HEADER).and_then(|id| id.to_str().ok());
    let id = id.map_or_else(|| edge.stats.next_id(), |id| id.chars().take(64).collect());
    let node_stream = dial(node, (address, port).into()).await.map_err(|e| (StatusCode::BAD_GATEWAY, Refusal::Unreachable, e))?;
    Ok((Stream { id, node: node.to_owned(), port }, node_stream))
}

/// Connects to a node of this pool.
pub(super) async fn dial(node: &str, address: std::net::SocketAddr) -> Result<TcpStream, String> {
    match timeout(limits::CONNECT, TcpStream::connect(address)).await {
        Ok(Ok(connected)) => {
            stream::prepare(&connected);
            Ok(connected)
        }
        Ok(Err(e)) => Err(format!("connect to {address} of node {node}: {e}")),
        Err(_) => Err(format!("connect to {address} of node {node}: no answer within {:?}", limits::CONNECT)),
    }
}
