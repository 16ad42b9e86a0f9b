//! Creates all tasks of the controller and runs them.

use std::sync::Arc;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config as ClientConfig};
use tokio::sync::{mpsc, watch as channel};
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::apply::Writer;
use crate::cluster::{self, Cluster, DecisionSettings};
use crate::config::{Config, Listen};
use crate::lead::Elector;
use crate::proxy::{publish::Publisher, signer::CertificateSigner};
use crate::reconcile::Reconciler;
use crate::webhook::rotation::CertificateRotation;
use crate::webhook::{WebhookConfig, serve};
use crate::{health, watch};

// Updates in the queue of the cluster's task.
const UPDATES: usize = 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
// Read timeout of the client, set with `reset_reader_on_write`: the time counts from the request,
// not from the moment at which the pooled connection became idle.
//
// An API server whose host lost power never answers. The bound is above the longest silence of a healthy watch:
// bookmarks arrive once a minute, and the first one of an API server that has just started arrives after two minutes
// (measured with 1.37).
const API_SERVER_SILENCE: Duration = Duration::from_secs(150);

/// The controller cannot start, or stopped unexpectedly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig is invalid.
    #[error("cannot read kubeconfig {path}: {source}")]
    Kubeconfig {
        /// Path of the file.
        path: String,
        /// Error of the parser.
        source: Box<kube::config::KubeconfigError>,
    },
    /// The API server's address is unknown.
    #[error("cannot find the API server: {0} (set --kubeconfig, or run in a Pod)")]
    Infer(#[source] Box<kube::config::InferConfigError>),
    /// The client of the API server cannot be created.
    #[error("cannot create a client of the API server: {0}")]
    Client(#[source] Box<kube::Error>),
    /// The port of the health probes cannot be opened.
    #[error(transparent)]
    Health(#[from] health::Error),
    /// The webhook cannot be served.
    #[error(transparent)]
    Webhook(#[from] serve::Error),
    /// A task ended although it should run until the controller stops.
    #[error("task '{0}' ended unexpectedly; this is a defect, see the log lines above")]
    Stopped(&'static str),
}

/// Creates a client from the kubeconfig, or from the environment of the process.
///
/// # Errors
/// If the kubeconfig is invalid, or no API server is configured.
pub async fn client(config: &Config) -> Result<Client, Error> {
    let client_config = match &config.kubeconfig {
        Some(path) => {
            let error = |source| Error::Kubeconfig { path: path.display().to_string(), source: Box::new(source) };
            let file = Kubeconfig::read_from(path).map_err(error)?;
            ClientConfig::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(error)?
        }
        None => ClientConfig::infer().await.map_err(|e| Error::Infer(Box::new(e)))?,
    };
    client_of(client_config)
}

fn client_of(mut config: ClientConfig) -> Result<Client, Error> {
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    // Without a timeout, a write could wait forever for a dead server, while the elector reconnects and stays leader.
    (config.read_timeout, config.reset_reader_on_write) = (Some(API_SERVER_SILENCE), true);
    Client::try_from(config).map_err(|e| Error::Client(Box::new(e)))
}

/// Runs the controller until `stop` is cancelled, then releases the Lease and returns.
///
/// # Errors
/// If a port cannot be opened, or a task ends unexpectedly.
pub async fn run(config: Config, client: Client, stop: CancellationToken) -> Result<(), Error> {
    let (namespace, identity) = (config.namespace.clone(), config.identity());
    let listener = health::bind(config.health_probe_addr).await?;
    let (identity_tx, serving_identity) = channel::channel(None);
    let webhook = match webhook_config(&config) {
        Some(webhook) => Some((serve::Server::bind(webhook.listen, serving_identity.clone()).await?, webhook)),
        None => None,
    };
    let settings = DecisionSettings {
        rules: config.auto_gateways,
        agent_timeout: config.agent_timeout,
        service_cidrs: config.service_cidr.clone(),
    };
    let cluster = Cluster::new(settings);
    let (updates_tx, updates) = mpsc::channel(UPDATES);
    let (snapshots_tx, snapshots) = channel::channel(Arc::new(cluster.snapshot()));
    let ready = health::Ready { cluster: snapshots.clone(), webhook: webhook.is_some().then_some(serving_identity) };
    let (elector, leadership) = Elector::new(client.clone(), &namespace, &config.lease_name, &identity);
    let writer = Writer::new(client.clone(), &identity, leadership.clone());
    let reconciler = Reconciler::new(writer, snapshots.clone(), updates_tx.clone(), leadership.clone());
    let signer =
        CertificateSigner::new(client.clone(), namespace.clone(), snapshots.clone(), leadership.clone(), &identity);
    let publisher = Publisher::new(client.clone(), namespace.clone(), snapshots, leadership.clone());
    tracing::info!(%identity, namespace, lease = config.lease_name, auto_gateways = config.auto_gateways, health = %config.health_probe_addr, "starting");

    // The Lease is released only after all writers have stopped.
    let stop_elector = CancellationToken::new();
    let elector = tokio::spawn(elector.run(stop_elector.clone()));

    let mut tasks = NamedTasks::default();
    if let Some((server, webhook)) = webhook {
        tasks.spawn("webhook server", server.run(stop.clone()));
        tasks.spawn(
            "webhook certificate",
            CertificateRotation::new(client.clone(), webhook, leadership, identity_tx).run(),
        );
    }
    tasks.spawn("health probes", health::serve(listener, ready, stop.clone()));
    tasks.spawn("cluster", cluster::run(cluster, updates, snapshots_tx));
    tasks.spawn("reconciler", reconciler.run(stop.clone()));
    tasks.spawn("certificate signer", signer.run());
    tasks.spawn("publisher", publisher.run());
    for (name, task) in watch::tasks(&client, &namespace, &updates_tx) {
        tasks.spawn(name, task);
    }

    let outcome = tokio::select! {
        name = tasks.first_to_end() => if stop.is_cancelled() { Ok(()) } else { Err(Error::Stopped(name)) },
        () = stop.cancelled() => Ok(()),
    };
    stop.cancel();
    tasks.set.shutdown().await;
    stop_elector.cancel();
    if let Err(e) = elector.await {
        tracing::error!(error = %e, "leader election ended unexpectedly");
    }
    tracing::info!("stopped");
    outcome
}

fn webhook_config(config: &Config) -> Option<WebhookConfig> {
    let Listen::At(listen) = config.webhook_bind_addr else {
        tracing::warn!(
            "the conversion webhook is off; Gateways of v1alpha1 cannot be read or written, unless a different webhook converts them"
        );
        return None;
    };
    let (namespace, service, url) =
        (config.namespace.clone(), config.webhook_service.clone(), config.webhook_url.clone());
    Some(WebhookConfig { listen, namespace, service, url })
}

// Tasks with names for error messages.
#[derive(Default)]
struct NamedTasks {
    set: JoinSet<()>,
    names: Vec<(Id, &'static str)>,
}

impl NamedTasks {
    fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let id = self.set.spawn(task).id();
        self.names.push((id, name));
    }

    async fn first_to_end(&mut self) -> &'static str {
        let id = match self.set.join_next_with_id().await {
            Some(Ok((id, ()))) => id,
            Some(Err(e)) => {
                tracing::error!(error = %e, "a task panicked");
                e.id()
            }
            None => return "none",
        };
        self.names.iter().find(|(known, _)| *known == id).map_or("unknown", |(_, name)| name)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Node;
    use kube::Api;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;
    use tokio::time::{Instant, pause, timeout};

    use super::*;

    #[tokio::test]
    async fn request_to_a_dead_api_server_times_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let uri = format!("http://{}", listener.local_addr().expect("it is bound")).parse().expect("a URI");
        let nodes: Api<Node> = Api::all(client_of(ClientConfig::new(uri)).expect("a client"));
        let request = tokio::spawn(async move { nodes.get("n").await });
        // The request arrives and is never answered, as by a host that lost power.
        let (mut stream, _) = listener.accept().await.expect("it dials");
        stream.read_u8().await.expect("it sends a request");
        pause();
        let start = Instant::now();
        let outcome = timeout(Duration::from_secs(600), request).await.expect("it times out").expect("no panic");
        assert!(outcome.is_err());
        // The limit is longer than the interval between bookmarks of an idle watch.
        assert!((121..=180).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    }
}
