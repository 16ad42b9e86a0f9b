//! `/healthz` and `/readyz`, as the kubelet asks for them. Tells nothing else.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::webhook::serve::Identity;

/// A port that could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("listen on {address} for health probes: {source} (is another raven-controller running here? see --health-probe-addr)")]
pub struct Error {
    /// Where.
    pub address: SocketAddr,
    /// Why.
    pub source: std::io::Error,
}

/// What must be before this replica is ready.
#[derive(Clone, Debug)]
pub struct Ready {
    /// Everything has been listed once.
    pub listed: watch::Receiver<bool>,
    /// What the conversion webhook serves; none where it is switched off.
    pub webhook: Option<watch::Receiver<Identity>>,
}

impl Ready {
    fn lacks(&self) -> Option<&'static str> {
        if !*self.listed.borrow() {
            return Some("waiting for the API server: Gateways and Nodes are not listed yet\n");
        }
        let dumb = self.webhook.as_ref().is_some_and(|identity| identity.borrow().is_none());
        // Ready replicas are behind the webhook's Service.
        dumb.then_some(
            "the conversion webhook has no certificate yet: is there a Secret for it (deploy/webhook.yaml), and may it be written?\n",
        )
    }
}

/// Opens the port.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| Error { address, source })
}

/// Answers until `stop`. Ready means that the caches are filled: a replica that does not lead is ready too.
pub async fn serve(listener: TcpListener, ready: Ready, stop: CancellationToken) {
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(e) => {
                    // Out of file descriptors, mostly: at once again would only burn the processor.
                    tracing::warn!(error = %e, "accept a health probe");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = stop.cancelled() => return,
        };
        let (ready, stop) = (ready.clone(), stop.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| std::future::ready(Ok::<_, Infallible>(answer(&request, ready.lacks()))));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(10))
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = connection => {}
                () = stop.cancelled() => {}
            }
        });
    }
}

fn answer(request: &Request<Incoming>, lacks: Option<&'static str>) -> Response<Full<Bytes>> {
    let (status, body) = verdict(request.uri().path(), lacks);
    let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
    *response.status_mut() = status;
    response
}

fn verdict(path: &str, lacks: Option<&'static str>) -> (StatusCode, &'static str) {
    match (path, lacks) {
        ("/healthz", _) | ("/readyz", None) => (StatusCode::OK, "ok\n"),
        ("/readyz", Some(what)) => (StatusCode::SERVICE_UNAVAILABLE, what),
        _ => (StatusCode::NOT_FOUND, "see /healthz and /readyz\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alive_before_ready() {
        assert_eq!(verdict("/healthz", Some("something")).0, StatusCode::OK);
        assert_eq!(verdict("/readyz", Some("something")), (StatusCode::SERVICE_UNAVAILABLE, "something"));
        assert_eq!(verdict("/readyz", None).0, StatusCode::OK);
        assert_eq!(verdict("/metrics", None).0, StatusCode::NOT_FOUND);
    }

    #[test]
    fn ready_with_everything_listed_and_a_webhook_that_can_answer() {
        let (listed_tx, listed) = watch::channel(false);
        let (_identity_tx, identity) = watch::channel(None);
        let without = Ready { listed: listed.clone(), webhook: None };
        let with = Ready { listed, webhook: Some(identity) };
        assert!(without.lacks().is_some_and(|what| what.contains("not listed yet")));
        listed_tx.send_replace(true);
        assert!(without.lacks().is_none());
        assert!(with.lacks().is_some_and(|what| what.contains("no certificate yet")));
    }
}
