//! Health probes of the kubelet: `/healthz` and `/readyz`.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
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

use crate::accept::accept;
use crate::cluster::Snapshot;
use crate::webhook::serve::ServingIdentity;

/// The port cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot listen on {address} for health probes: {source} (another process may use the port; see --health-probe-addr)"
)]
pub struct Error {
    /// Address to listen on.
    pub address: SocketAddr,
    /// Error of the operating system.
    pub source: std::io::Error,
}

/// Conditions for the readiness of this replica.
#[derive(Clone, Debug)]
pub(crate) struct Ready {
    /// State of the cluster: ready once it is complete.
    pub(crate) cluster: watch::Receiver<Arc<Snapshot>>,
    /// Certificate of the conversion webhook; `None` if the webhook is off.
    pub(crate) webhook: Option<watch::Receiver<ServingIdentity>>,
}

impl Ready {
    // Returns the reason why this replica is not ready.
    fn missing(&self) -> Option<&'static str> {
        if !self.cluster.borrow().complete {
            return Some("waiting for the API server: Gateways, Nodes or related objects are not listed yet\n");
        }
        // The webhook's Service routes to ready replicas, so the webhook must be able to answer.
        let without_certificate = self.webhook.as_ref().is_some_and(|identity| identity.borrow().is_none());
        without_certificate.then_some(
            "the conversion webhook has no certificate yet: check that its Secret exists (deploy/webhook.yaml) and that RBAC allows the controller to update it\n",
        )
    }
}

/// Opens the port.
pub(crate) async fn bind(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| Error { address, source })
}

/// Answers probes until `stop` is cancelled. A replica that does not lead is ready as well.
pub(crate) async fn serve(listener: TcpListener, ready: Ready, stop: CancellationToken) {
    loop {
        let stream = tokio::select! {
            stream = accept(&listener, "a health probe") => stream,
            () = stop.cancelled() => return,
        };
        let (ready, stop) = (ready.clone(), stop.clone());
        tokio::spawn(async move {
            let service =
                service_fn(move |request| std::future::ready(Ok::<_, Infallible>(answer(&request, ready.missing()))));
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

fn answer(request: &Request<Incoming>, missing: Option<&'static str>) -> Response<Full<Bytes>> {
    let (status, body) = verdict(request.uri().path(), missing);
    let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
    *response.status_mut() = status;
    response
}

fn verdict(path: &str, missing: Option<&'static str>) -> (StatusCode, &'static str) {
    match (path, missing) {
        ("/healthz", _) | ("/readyz", None) => (StatusCode::OK, "ok\n"),
        ("/readyz", Some(what)) => (StatusCode::SERVICE_UNAVAILABLE, what),
        _ => (StatusCode::NOT_FOUND, "see /healthz and /readyz\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Cluster, DecisionSettings};

    #[test]
    fn live_before_ready() {
        assert_eq!(verdict("/healthz", Some("something")).0, StatusCode::OK);
        assert_eq!(verdict("/readyz", Some("something")), (StatusCode::SERVICE_UNAVAILABLE, "something"));
        assert_eq!(verdict("/readyz", None).0, StatusCode::OK);
        assert_eq!(verdict("/metrics", None).0, StatusCode::NOT_FOUND);
    }

    #[test]
    fn ready_once_the_cluster_is_complete_and_the_webhook_has_a_certificate() {
        let snapshot = |complete| {
            let mut snapshot = Cluster::new(DecisionSettings::default()).snapshot();
            snapshot.complete = complete;
            Arc::new(snapshot)
        };
        let (cluster_tx, cluster) = watch::channel(snapshot(false));
        let (_identity_tx, identity) = watch::channel(None);
        let without = Ready { cluster: cluster.clone(), webhook: None };
        let with = Ready { cluster, webhook: Some(identity) };
        assert!(without.missing().is_some_and(|what| what.contains("not listed yet")));
        cluster_tx.send_replace(snapshot(true));
        assert!(without.missing().is_none());
        assert!(with.missing().is_some_and(|what| what.contains("no certificate yet")));
    }
}
