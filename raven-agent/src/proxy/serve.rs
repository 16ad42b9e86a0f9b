//! The edge's half of a proxy connection: answers `CONNECT node:port` on a connection that the edge dialled. It
//! connects only to listed ports of nodes of its own pool.

use std::{convert::Infallible, sync::Arc, time::Duration};

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
use tracing::Instrument;

use super::{
    limits::{self, Liveness},
    liveness::{self, INTERVAL_HEADER, KEEPALIVE_HEADER, ROUND_TRIP_HEADER},
    stats::{ConnectionStats, Refusal, Stats},
    stream::{self, Stream},
};
use crate::plan::proxy::ProxyPlan;

/// Header with a stream's id.
pub(super) const STREAM_HEADER: &str = "raven-stream";
/// URI of the cloud's round-trip measurements.
pub(super) const PROBE_URI: &str = "http://raven/";
/// Header with the reason of a refusal, as text.
pub(super) const REASON_HEADER: &str = "raven-reason";

type Answer = Response<Empty<hyper::body::Bytes>>;

/// Answers the requests on the edge's connections.
#[derive(Clone)]
pub(crate) struct EdgeServer {
    pub(crate) plan: watch::Receiver<Arc<ProxyPlan>>,
    pub(crate) stats: Stats,
    pub(crate) liveness: Liveness,
}

/// Serves a connection until it ends. After `retire` is cancelled it accepts no new streams and ends with the last one.
/// `keepalive`: the connection's interval, for the cloud.
pub(crate) async fn serve<S>(
    io: S,
    edge: EdgeServer,
    keepalive: Duration,
    stats: Arc<ConnectionStats>,
    retire: CancellationToken,
) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let builder = limits::server(edge.liveness);
    let io = TokioIo::new(stats.count(io));
    let service = service_fn(move |request: Request<Incoming>| {
        let (edge, stats) = (edge.clone(), stats.clone());
        async move {
            Ok::<_, Infallible>(if request.method() == Method::OPTIONS {
                if request.headers().contains_key(INTERVAL_HEADER) {
                    stats.set_quiet(liveness::quiet(round_trip(&request)));
                }
                measured(keepalive)
            } else {
                answer(request, edge, stats).await
            })
        }
    });
    let mut connection = std::pin::pin!(builder.serve_connection(io, service));
    tokio::select! {
        ended = &mut connection => return ended,
        () = retire.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

/// The cloud's estimate of the round-trip time. Clouds of older releases send none.
fn round_trip(measurement: &Request<Incoming>) -> Duration {
    let text = measurement.headers().get(ROUND_TRIP_HEADER).and_then(|header| header.to_str().ok());
    Duration::from_millis(text.and_then(|text| text.parse().ok()).unwrap_or_default())
}

/// The answer to a measurement.
fn measured(keepalive: Duration) -> Answer {
    let mut response = Response::new(Empty::new());
    response.headers_mut().insert(KEEPALIVE_HEADER, HeaderValue::from(keepalive.as_secs()));
    response
}

async fn answer(request: Request<Incoming>, edge: EdgeServer, connection: Arc<ConnectionStats>) -> Answer {
    match connect(&request, &edge).await {
        Ok((stream, node)) => {
            // HTTP/2 enforces the limit of concurrent streams.
            let slot = connection.take_slot(u32::MAX);
            let span = stream.span();
            let task = async move {
                let _slot = slot;
                match hyper::upgrade::on(request).await {
                    // On the edge, the proxy connection is the client's side of the stream.
                    Ok(client) => stream::carry(stream, TokioIo::new(client), node, &[], &edge.stats).await,
                    Err(e) => tracing::debug!(error = %e, "the proxy connection ended before the stream began"),
                }
            };
            tokio::spawn(task.instrument(span));
            Response::new(Empty::new())
        }
        Err((status, refusal, reason)) => {
            if edge.stats.refused(refusal) {
                let target = request.uri().authority().map(hyper::http::uri::Authority::as_str);
                tracing::warn!(target_node = target, reason = refusal.as_str(), error = reason, "refused a stream");
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

async fn connect(request: &Request<Incoming>, edge: &EdgeServer) -> Result<(Stream, TcpStream), Refused> {
    let authority = request.uri().authority().filter(|_| request.method() == Method::CONNECT);
    let Some((node, port)) = authority.and_then(|a| Some((a.host(), a.port_u16()?))) else {
        return Err((StatusCode::BAD_REQUEST, Refusal::Malformed, "expected CONNECT node:port".to_owned()));
    };
    let address = {
        let plan = edge.plan.borrow();
        let target =
            plan.directory.by_name(node, port).map_err(|e| (StatusCode::FORBIDDEN, Refusal::Unknown, e.to_string()))?;
        if target.pool != plan.directory.own_pool {
            let reason =
                format!("node {node} belongs to Gateway {}, not to Gateway {}", target.pool, plan.directory.own_pool);
            return Err((StatusCode::FORBIDDEN, Refusal::Unknown, reason));
        }
        plan.directory.reached_at(target)
    };
    let id = request.headers().get(STREAM_HEADER).and_then(|id| id.to_str().ok());
    let id = id.map_or_else(|| edge.stats.next_id(), |id| id.chars().take(64).collect());
    let node_stream =
        dial(node, (address, port).into()).await.map_err(|e| (StatusCode::BAD_GATEWAY, Refusal::Unreachable, e))?;
    Ok((Stream { id, node: node.to_owned(), port }, node_stream))
}

/// Connects to a node of this pool.
pub(super) async fn dial(node: &str, address: std::net::SocketAddr) -> Result<TcpStream, String> {
    match timeout(limits::CONNECT, TcpStream::connect(address)).await {
        Ok(Ok(connected)) => {
            stream::prepare(&connected);
            Ok(connected)
        }
        Ok(Err(e)) => Err(format!("cannot connect to {address} of node {node}: {e}")),
        Err(_) => {
            Err(format!("cannot connect to {address} of node {node}: timed out after {} s", limits::CONNECT.as_secs()))
        }
    }
}
