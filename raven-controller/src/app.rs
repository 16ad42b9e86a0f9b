//! Puts the parts together; the only place that spawns them.

use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config as ClientConfig};
use raven_api::API_SERVER_SILENCE;
use tokio::sync::{mpsc, watch};
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::apply::Writer;
use crate::config::{Config, Listen};
use crate::lead::Elector;
use crate::proxy::{self, grant::Granter, publish::Publisher};
use crate::reconcile::Reconciler;
use crate::webhook::keep::Keeper;
use crate::webhook::{Place, serve};
use crate::world::Settings;
use crate::{health, watch as follow};

// Watches wait when the reconciler is busy writing.
const UPDATES: usize = 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the controller cannot start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig is unusable.
    #[error("read kubeconfig {path}: {source}")]
    Kubeconfig {
        /// Which file.
        path: String,
        /// Why.
        source: Box<kube::config::KubeconfigError>,
    },
    /// No way to the API server was found.
    #[error("find the API server: {0} (give --kubeconfig, or run in a Pod)")]
    Infer(#[source] Box<kube::config::InferConfigError>),
    /// The client could not be made.
    #[error("make a client of the API server: {0}")]
    Client(#[source] Box<kube::Error>),
    /// The probe port is taken.
    #[error(transparent)]
    Health(#[from] health::Error),
    /// The webhook's port is taken.
    #[error(transparent)]
    Webhook(#[from] serve::Error),
    /// A part stopped that never should.
    #[error("task {0} stopped by itself (a defect: see the lines above)")]
    Stopped(&'static str),
}

/// A client by kubeconfig, or by whatever the surroundings offer.
pub async fn client(config: &Config) -> Result<Client, Error> {
    let settings = match &config.kubeconfig {
        Some(path) => {
            let error = |source| Error::Kubeconfig { path: path.display().to_string(), source: Box::new(source) };
            let file = Kubeconfig::read_from(path).map_err(error)?;
            ClientConfig::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(error)?
        }
        None => ClientConfig::infer().await.map_err(|e| Error::Infer(Box::new(e)))?,
    };
    client_of(settings)
}

fn client_of(mut settings: ClientConfig) -> Result<Client, Error> {
    settings.connect_timeout = Some(CONNECT_TIMEOUT);
    // A write may wait for a server that is gone, while the elector, which dials anew, stays leader.
    (settings.read_timeout, settings.reset_reader_on_write) = (Some(API_SERVER_SILENCE), true);
    Client::try_from(settings).map_err(|e| Error::Client(Box::new(e)))
}

/// Runs the controller until `stop`; then hands the Lease back and returns.
pub async fn run(config: Config, client: Client, stop: CancellationToken) -> Result<(), Error> {
    let identity = config.identity();
    let listener = health::bind(config.health_probe_addr).await?;
    let (ready_tx, ready) = watch::channel(false);
    let (identity_tx, webhook_identity) = watch::channel(None);
    let webhook = match place(&config) {
        Some(place) => Some((serve::Server::bind(place.listen, webhook_identity.clone()).await?, place)),
        None => None,
    };
    let ready = health::Ready { listed: ready, webhook: webhook.is_some().then_some(webhook_identity) };
    let (updates_tx, updates) = mpsc::channel(UPDATES);
    let (elector, mandate) = Elector::new(client.clone(), &config.namespace, &config.lease_name, &identity);
    let writer = Writer::new(client.clone(), &identity, mandate.clone());
    let (cluster, changes) = proxy::follow::follow(client.clone(), &config.namespace);
    let granter = Granter::new(client.clone(), config.namespace.clone(), cluster.clone(), mandate.clone(), &identity);
    let publisher = Publisher::new(client.clone(), config.namespace.clone(), cluster, changes, mandate.clone());
    let settings = Settings { rules: config.auto_gateways, services: config.service_cidr.clone() };
    let reconciler = Reconciler::new(settings, writer, updates, mandate.clone(), ready_tx);
    tracing::info!(%identity, namespace = %config.namespace, lease = %config.lease_name, auto_gateways = config.auto_gateways, health = %config.health_probe_addr, "start");

    // The Lease is given back only when nothing writes any more.
    let stop_elector = CancellationToken::new();
    let elector = tokio::spawn(elector.run(stop_elector.clone()));

    let mut parts = Parts::default();
    if let Some((server, place)) = webhook {
        parts.spawn("webhook", server.run(stop.clone()));
        parts.spawn("webhook certificate", Keeper::new(client.clone(), place, mandate, identity_tx).run());
    }
    parts.spawn("health", health::serve(listener, ready, stop.clone()));
    parts.spawn("reconciler", reconciler.run(stop.clone()));
    parts.spawn("certificates of proxies", granter.run());
    parts.spawn("services of proxies", publisher.run());
    parts.spawn("gateways", follow::follow_gateways(client.clone(), updates_tx.clone()));
    parts.spawn("nodes", follow::follow_nodes(client.clone(), updates_tx.clone()));
    parts.spawn("switches", follow::follow_switches(client.clone(), config.namespace.clone(), updates_tx.clone()));
    parts.spawn("links", follow::follow_links(client.clone(), updates_tx.clone()));
    parts.spawn("balancers", follow::follow_balancers(client.clone(), config.namespace.clone(), updates_tx.clone()));
    parts.spawn("api server", follow::follow_api_server(client.clone(), updates_tx.clone()));
    parts.spawn("services", follow::follow_services(client.clone(), updates_tx.clone()));
    parts.spawn("blocks", follow::follow_optional(client.clone(), &follow::BLOCKS, updates_tx.clone()));
    parts.spawn("pools", follow::follow_optional(client, &follow::NODE_POOLS, updates_tx));

    let outcome = tokio::select! {
        name = parts.first() => if stop.is_cancelled() { Ok(()) } else { Err(Error::Stopped(name)) },
        () = stop.cancelled() => Ok(()),
    };
    stop.cancel();
    parts.tasks.shutdown().await;
    stop_elector.cancel();
    if let Err(e) = elector.await {
        tracing::error!(error = %e, "leader election");
    }
    tracing::info!("stopped");
    outcome
}

fn place(config: &Config) -> Option<Place> {
    let Listen::At(listen) = config.webhook_bind_addr else {
        tracing::warn!(
            "the conversion webhook is switched off: Gateways of v1alpha1 cannot be read or written, unless something else converts them"
        );
        return None;
    };
    let (namespace, service, url) = (config.namespace.clone(), config.webhook_service.clone(), config.webhook_url.clone());
    Some(Place { listen, namespace, service, url })
}

// Tasks by name, so that one that dies can be named.
#[derive(Default)]
struct Parts {
    tasks: JoinSet<()>,
    names: Vec<(Id, &'static str)>,
}

impl Parts {
    fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let id = self.tasks.spawn(task).id();
        self.names.push((id, name));
    }

    async fn first(&mut self) -> &'static str {
        let id = match self.tasks.join_next_with_id().await {
            Some(Ok((id, ()))) => id,
            Some(Err(e)) => {
                tracing::error!(error = %e, "task");
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
    async fn an_api_server_that_is_gone_is_not_waited_for_for_ever() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let uri = format!("http://{}", listener.local_addr().expect("it is bound")).parse().expect("a URI");
        let nodes: Api<Node> = Api::all(client_of(ClientConfig::new(uri)).expect("a client"));
        let request = tokio::spawn(async move { nodes.get("n").await });
        // The request arrives, and nothing comes of it: the host has lost its power.
        let (mut stream, _) = listener.accept().await.expect("it dials");
        stream.read_u8().await.expect("it asks");
        pause();
        let asked = Instant::now();
        let outcome = timeout(Duration::from_secs(600), request).await.expect("it gives up").expect("no panic");
        assert!(outcome.is_err());
        // Nor is a watch without news cut off before it has its bookmark.
        assert!((121..=180).contains(&asked.elapsed().as_secs()), "{:?}", asked.elapsed());
    }
}
