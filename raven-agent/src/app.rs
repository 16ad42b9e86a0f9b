//! Builds the stages and joins them. The only place that spawns tasks of the agent.
//!
//! [`watch`](crate::watch) and the snapshot on disk give the inputs; one loop owns the drivers and reconciles when inputs
//! change, when somebody else changes our part of the kernel, and now and then anyway; the publisher and the admin
//! servers read what it reports. Ending leaves everything as it is: packets go on.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use futures::StreamExt;
use ipnet::IpNet;
use kube::{
    Client,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{interval, sleep},
};

use crate::{
    apply::{Reconciler, Report, Settings},
    bpf::probe,
    config::Run,
    link::Links,
    names, observe,
    proxy::{self, Proxy, stats::Stats},
    snapshot,
    topology::{Inputs, PresharedKey, Topology, build},
    tunnel, watch as api_watch,
};

/// A run without a change, to find what no notification told (a map that somebody else changed, say).
const RESYNC: Duration = Duration::from_secs(30);
/// Changes within this time are one.
const SETTLE: Duration = Duration::from_millis(100);

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: Run) -> Result<()> {
    config.upstream.warnings().iter().for_each(|w| tracing::warn!("{w}"));
    anyhow::ensure!(!config.node_name.is_empty(), "--node-name (or NODE_NAME) is needed: the name of this node in Kubernetes");
    let release = probe::release().map_err(anyhow::Error::msg)?;
    anyhow::ensure!(release >= probe::FLOOR, "Linux {release} is older than {}, the oldest that Raven runs on", probe::FLOOR);
    let (client, server) = connect(&config).await?;
    let protected = config.protected.iter().copied().chain(server).chain(service_address()).collect();
    let settings = Settings {
        node: config.node_name.clone(),
        node_ip: config.node_ip,
        protected,
        release,
        tc_attach: config.tc_attach,
        tier: config.tier,
        ebpf_object: config.ebpf_object.clone(),
        preshared_key_file: config.preshared_key_file.clone(),
        preshared_key: config.preshared_key.as_deref().and_then(|text| PresharedKey::from_bytes(text.as_bytes())),
    };
    tracing::info!(%release, ?settings, version = env!("CARGO_PKG_VERSION"), "starting");
    let key = tunnel::load_or_make_key(&config.state_dir.join(names::KEY_FILE))?;
    let (links, kernel_events) = Links::connect()?;
    let dialled = proxy::listen_transparently();
    if let Err(e) = &dialled {
        tracing::warn!("listen for connections by address: {e}; kubelets of edge nodes are reached by name only");
    }
    let dialled = dialled.ok();
    let mut reconciler = Reconciler::new(settings, links, key, dialled.as_ref().and_then(|l| l.try_clone().ok()))?;
    if let Some(flush) = reconciler.take_trace() {
        tokio::spawn(trace(flush));
    }

    let (inputs, inputs_seen) = watch::channel(last_topology(&config));
    let (reports, latest) = watch::channel(None);
    let (orders, proxied, stats) = (watch::Sender::default(), watch::Sender::new(None), Stats::default());
    let proxy = proxy::Settings {
        node: config.node_name.clone(),
        state: config.state_dir.clone(),
        secure: config.proxy_internal_secure_addr,
        insecure: config.proxy_internal_insecure_addr,
    };
    let proxy = Proxy::new(proxy, client.clone(), orders.subscribe(), proxied.clone(), stats.clone(), dialled);
    tokio::spawn(proxy.run());
    if let Some(client) = client {
        let (watched, namespace, inputs) = (client.clone(), config.namespace.clone(), inputs.clone());
        tokio::spawn(async move { api_watch::run(watched, &namespace, inputs).await });
        tokio::spawn(observe::publish(client, config.node_name.clone(), latest.clone(), proxied.subscribe(), inputs_seen.clone()));
    }
    let drops = observe::Drops::default();
    tokio::spawn(drops.clone().read());
    tokio::spawn(observe::admin::serve(config.metric_bind_addr, latest.clone(), drops.clone(), stats.clone()));
    tokio::spawn(observe::admin::serve(config.health_probe_addr, latest, drops, stats));
    let work = Loop {
        node: config.node_name.clone(),
        reconciler,
        feed: Feed::new(inputs_seen),
        kernel_events,
        snapshot: config.state_dir.join(names::SNAPSHOT_FILE),
        reports,
        orders,
    };
    tokio::select! {
        () = work.run() => Ok(()),
        result = stop() => result,
    }
}

/// Writes the programs' log lines, where they were built to have any.
async fn trace(mut flush: impl FnMut()) {
    let mut period = interval(SETTLE);
    loop {
        period.tick().await;
        flush();
    }
}

async fn stop() -> Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
    tracing::info!("stopping; the dataplane stays as it is");
    Ok(())
}

/// The client, and the API server's address, which must never end in the tunnel.
async fn connect(config: &Run) -> Result<(Option<Client>, Option<IpNet>)> {
    if config.offline {
        return Ok((None, None));
    }
    let mut cluster = match &config.kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).with_context(|| format!("read kubeconfig {}", path.display()))?;
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?
        }
        None => kube::Config::incluster().context("no --kubeconfig, and not in a pod with a service account")?,
    };
    (cluster.read_timeout, cluster.reset_reader_on_write) = (Some(raven_api::API_SERVER_SILENCE), true);
    let server = cluster.cluster_url.host().and_then(|h| h.trim_matches(['[', ']']).parse().ok()).map(|ip: std::net::IpAddr| ip.into());
    Ok((Some(Client::try_from(cluster)?), server))
}

/// The API server's Service, in a pod.
fn service_address() -> Option<IpNet> {
    let host = std::env::var("KUBERNETES_SERVICE_HOST").ok()?;
    host.parse::<std::net::IpAddr>().ok().map(IpNet::from)
}

fn last_topology(config: &Run) -> Option<Inputs> {
    let path = config.state_dir.join(names::SNAPSHOT_FILE);
    match snapshot::load(&path) {
        Ok(Some(inputs)) => {
            tracing::info!(path = %path.display(), gateways = inputs.gateways.len(), "starting with the last topology");
            Some(inputs)
        }
        Ok(None) => None,
        Err(e) => {
            tracing::warn!("read {}: {e}; waiting for the API server", path.display());
            None
        }
    }
}

struct Loop<S> {
    node: String,
    reconciler: Reconciler,
    feed: Feed,
    kernel_events: S,
    snapshot: PathBuf,
    reports: watch::Sender<observe::Latest>,
    orders: watch::Sender<proxy::Orders>,
}

impl<S: futures::Stream<Item = ()> + Unpin> Loop<S> {
    async fn run(mut self) {
        let mut said = Vec::new();
        // Most runs come without new inputs (the kernel changed, or nothing did): what follows from the inputs alone is kept.
        let mut known: Option<Known> = None;
        loop {
            let (mut news, mut again) = (false, None);
            if let Some(inputs) = self.feed.take() {
                news = true;
                let topology = build(&inputs);
                self.orders.send_replace((Arc::new(proxy::plan::plan(&topology, &self.node, None)), topology.proxy_ca.clone()));
                known = Some(Known { topology, inputs, saved: false });
            }
            if let Some(known) = &mut known {
                self.keep(known);
                let report = self.reconciler.reconcile(&known.topology, news).await;
                again = report.again;
                say(&report, &mut said);
                self.reports.send_replace(Some((report, self.reconciler.tunnel())));
            }
            tokio::select! {
                () = self.feed.changed() => {}
                Some(()) = self.kernel_events.next() => {}
                () = sleep(again.unwrap_or(RESYNC)) => {}
            }
            // What our own steps caused, and what comes in a burst, is looked at once.
            sleep(SETTLE).await;
            while let Some(Some(())) = futures::FutureExt::now_or_never(self.kernel_events.next()) {}
        }
    }

    /// Writes the snapshot, if it is not there as it should be; tried again with every run until it is.
    fn keep(&self, known: &mut Known) {
        if known.saved && self.snapshot.exists() {
            return;
        }
        match self.save(&known.inputs) {
            Ok(()) => known.saved = true,
            Err(e) => {
                tracing::warn!("write {}: {e}; a boot without the API server would start with an older topology", self.snapshot.display())
            }
        }
    }

    fn save(&self, inputs: &Inputs) -> std::io::Result<()> {
        let same = snapshot::load(&self.snapshot).ok().flatten().as_ref() == Some(&snapshot::lean(inputs));
        if same { Ok(()) } else { snapshot::save(&self.snapshot, inputs) }
    }
}

/// The inputs, each taken once.
///
/// To wait for a change of a `watch` channel is to have seen it, so `has_changed` says no right after: what was waited for is
/// remembered here until it is taken.
struct Feed {
    inputs: watch::Receiver<Option<Inputs>>,
    fresh: bool,
}

impl Feed {
    fn new(inputs: watch::Receiver<Option<Inputs>>) -> Self {
        Self { inputs, fresh: true }
    }

    /// Inputs that nobody has taken yet.
    fn take(&mut self) -> Option<Inputs> {
        std::mem::take(&mut self.fresh).then(|| self.inputs.borrow_and_update().clone()).flatten()
    }

    /// Waits for other inputs; for ever where nobody watches any more.
    async fn changed(&mut self) {
        match self.inputs.changed().await {
            Ok(()) => self.fresh = true,
            Err(_) => std::future::pending().await,
        }
    }
}

/// The latest inputs, and what follows from them alone.
struct Known {
    inputs: Inputs,
    topology: Topology,
    /// The snapshot on disk is of these inputs.
    saved: bool,
}

/// Logs what is new: a complaint once, until it is gone.
fn say(report: &Arc<Report>, said: &mut Vec<String>) {
    let complaints: Vec<String> = report.complaints().cloned().collect();
    complaints.iter().filter(|c| !said.contains(c)).for_each(|c| tracing::warn!("{c}"));
    if complaints.is_empty() && !said.is_empty() {
        tracing::info!("all of the above is settled");
    }
    *said = complaints;
    if report.changes > 0 {
        tracing::info!(
            changes = report.changes,
            role = ?report.plan.role,
            gateway = report.plan.pool,
            tier = report.tier,
            tier_reason = report.tier_reason,
            wireguard = report.backend.map(tunnel::Backend::as_str),
            prefixes = report.plan.state.remote.len(),
            peers = report.plan.state.peers.len(),
            "the dataplane is as planned"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn inputs_that_were_waited_for_are_taken_once() {
        let (sender, receiver) = watch::channel(None);
        let mut feed = Feed::new(receiver);
        assert_eq!(feed.take(), None, "there are none yet");
        let inputs = Inputs { gateways: vec![raven_api::Gateway::new("cloud", Default::default())], ..Inputs::default() };
        sender.send_replace(Some(inputs.clone()));
        feed.changed().await;
        assert_eq!(feed.take(), Some(inputs));
        assert_eq!(feed.take(), None, "taken already");
    }
}
