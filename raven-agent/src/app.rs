//! Builds the stages and connects them.
//!
//! [`watch`](crate::watch) and the snapshot on disk provide the inputs. One loop owns the drivers and reconciles when
//! the inputs change, when another program changes Raven's part of the kernel, and at intervals. The publisher and the
//! HTTP servers read its reports. Stopping changes nothing: packets are still forwarded.
//!
//! Two runtimes: the proxy, which moves the bytes of streams, has its own threads, so that a metrics scrape or a large
//! API event does not delay them.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use futures::{StreamExt, stream};
use ipnet::IpNet;
use kube::{
    Client,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{interval, sleep},
};
use tracing::Instrument;

use crate::{
    api_client,
    apply::{Reconciler, Report, Settings},
    boot::Boot,
    bpf::probe,
    config::Run,
    leftovers,
    link::Links,
    names, netfilter,
    observe::{
        self,
        admin::{self, Paths},
        secure::Access,
    },
    plan::{ProxyPlan, plan},
    proxy::{self, Liveness, Proxy, ProxySettings, stats::Stats},
    resolve, snapshot,
    state::Role,
    topology::{Inputs, PresharedKey, Topology, build},
    tunnel, watch as api_watch,
};

/// Interval of runs without a change. They find changes that cause no notification, such as map entries changed
/// by another program.
const RESYNC: Duration = Duration::from_secs(30);
/// Changes within this time cause one run.
const SETTLE: Duration = Duration::from_millis(100);

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: Run) -> Result<()> {
    config
        .upstream
        .warnings()
        .iter()
        .for_each(|flag| tracing::warn!(problem = flag, "a flag of OpenYurt's agent has no effect"));
    anyhow::ensure!(
        !config.node_name.is_empty(),
        "--node-name (or NODE_NAME) is required: the name of this node in Kubernetes"
    );
    let release = probe::release().map_err(anyhow::Error::msg)?;
    anyhow::ensure!(
        release >= probe::FLOOR,
        "Linux {release} is not supported; Raven needs Linux {} or later",
        probe::FLOOR
    );
    let (client, server) = connect(&config).await?;
    let settings = settings(&config, release, server);
    tracing::info!(node = settings.node, kernel = %release, version = env!("CARGO_PKG_VERSION"), "starting");
    tracing::debug!(?settings, "settings");
    let key = tunnel::load_or_create_key(&config.state_dir.join(names::KEY_FILE))?;
    let (links, link_events) = Links::connect()?;
    let kernel_events = stream::select(link_events, netfilter::deletions());
    let intercepted = proxy::listen_for_intercepted()
        .inspect_err(
            |e| tracing::warn!(error = %e, "cannot listen for intercepted connections; kubelets of edge nodes are reachable by name only"),
        )
        .ok();
    let mut reconciler =
        Reconciler::new(settings, links.clone(), key, intercepted.as_ref().and_then(|l| l.try_clone().ok()))?;
    if let Some(flush) = reconciler.take_trace() {
        tokio::spawn(trace(flush));
    }

    let (inputs, inputs_seen) = watch::channel(last_topology(&config));
    let (reports, latest) = watch::channel(None);
    let (plans, proxied, stats) = (watch::Sender::default(), watch::Sender::new(None), Stats::default());
    let proxy = ProxySettings {
        node: config.node_name.clone(),
        state: config.state_dir.clone(),
        secure: config.proxy_internal_secure_addr,
        insecure: config.proxy_internal_insecure_addr,
        liveness: Liveness {
            keepalive: Duration::from_secs(config.proxy_keepalive.into()),
            ping: Duration::from_secs(config.proxy_ping.into()),
            stream_timeout: Duration::from_secs(config.proxy_stream_timeout.into()),
        },
    };
    let access = metrics_access(&config, client.clone())?;
    let proxy = Proxy::new(proxy, client.clone(), plans.subscribe(), proxied.clone(), stats.clone(), intercepted);
    let proxy_runtime = ProxyRuntime::new()?;
    proxy_runtime.0.as_ref().map(|runtime| runtime.spawn(proxy.run()));
    let outages = api_watch::Outages::default();
    if let Some(client) = client {
        let watch_outages = outages.clone();
        let (watched, namespace, inputs) = (client.clone(), config.namespace.clone(), inputs.clone());
        tokio::spawn(async move { api_watch::run(watched, &namespace, inputs, watch_outages).await });
        let (own, own_seen) = watch::channel(None);
        let (watched, node) = (client.clone(), config.node_name.clone());
        tokio::spawn(async move { api_watch::run_own(watched, &node, own).await });
        let node = config.node_name.clone();
        tokio::spawn(observe::publish_events(client.clone(), node, latest.clone(), inputs_seen.clone()));
        tokio::spawn(observe::publish(client, config.node_name.clone(), latest.clone(), proxied.subscribe(), own_seen));
    }
    tokio::spawn(resolve::run(inputs, config.node_name.clone(), latest.clone()));
    let drops = observe::Drops::default();
    tokio::spawn(drops.clone().read());
    let sources = admin::Sources { latest, proxy: proxied.subscribe(), drops, stats, outages };
    tokio::spawn(admin::serve(config.metric_bind_addr, Paths::All, access, sources.clone()));
    tokio::spawn(admin::serve(config.health_probe_addr, Paths::Health, None, sources));
    let work = Loop {
        reconciler,
        feed: Feed::new(inputs_seen),
        kernel_events,
        snapshot: config.state_dir.join(names::SNAPSHOT_FILE),
        leftovers: Some((links, config.adopt)),
        boot: Boot::new(&config.state_dir, config.boot_unit_dir.clone()),
        reports,
        plans,
    };
    tokio::select! {
        () = work.run() => Ok(()),
        result = terminated() => {
            tracing::info!("stopping; the kernel continues to forward");
            result
        }
    }
}

/// `server`: the address of the API server, where the kubeconfig has one.
fn settings(config: &Run, release: probe::Release, server: Option<IpNet>) -> Settings {
    let protected = config.protected.iter().copied().chain(server).chain(service_address()).collect();
    Settings {
        node: config.node_name.clone(),
        node_ip: config.node_ip,
        protected,
        masquerade_mark: 1 << config.masquerade_bit,
        tunnel_mtu: config.tunnel_mtu,
        release,
        tc_attach: config.tc_attach,
        tier: config.tier,
        wireguard_engine: config.wireguard_engine,
        ebpf_object: config.ebpf_object.clone(),
        preshared_key_file: config.preshared_key_file.clone(),
        preshared_key: config.preshared_key.as_deref().and_then(|text| PresharedKey::from_bytes(text.as_bytes())),
    }
}

/// The runtime of the proxy. Dropping it aborts its tasks without waiting for them.
struct ProxyRuntime(Option<Runtime>);

impl ProxyRuntime {
    fn new() -> Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(2).thread_name("proxy").enable_all().build();
        Ok(Self(Some(runtime.context("cannot start the threads of the proxy")?)))
    }
}

impl Drop for ProxyRuntime {
    fn drop(&mut self) {
        // A runtime must not be dropped in an async context, unless in the background.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Copies the programs' log lines, if they were built with logging.
async fn trace(mut flush: impl FnMut()) {
    let mut period = interval(SETTLE);
    loop {
        period.tick().await;
        flush();
    }
}

/// Waits for SIGTERM or SIGINT.
pub async fn terminated() -> Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
    Ok(())
}

/// Who may read the metrics address; `None` if everyone may.
fn metrics_access(config: &Run, client: Option<Client>) -> Result<Option<Access>> {
    let access = || Access::new(client, &config.node_name, config.metrics_cert_dir.clone());
    Ok(config.metrics_secure.then(access).transpose()?)
}

/// The client, and the API server's address, which must never enter the tunnel.
async fn connect(config: &Run) -> Result<(Option<Client>, Option<IpNet>)> {
    if config.offline {
        return Ok((None, None));
    }
    let cluster = match &config.kubeconfig {
        Some(path) => {
            let file =
                Kubeconfig::read_from(path).with_context(|| format!("cannot read kubeconfig {}", path.display()))?;
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?
        }
        None => kube::Config::incluster().context("no service account found; set --kubeconfig outside of a Pod")?,
    };
    let server = cluster
        .cluster_url
        .host()
        .and_then(|h| h.trim_matches(['[', ']']).parse().ok())
        .map(|ip: std::net::IpAddr| ip.into());
    Ok((Some(api_client::client(cluster)?), server))
}

/// The address of the API server's Service, in a Pod.
fn service_address() -> Option<IpNet> {
    let host = std::env::var("KUBERNETES_SERVICE_HOST").ok()?;
    host.parse::<std::net::IpAddr>().ok().map(IpNet::from)
}

fn last_topology(config: &Run) -> Option<Arc<Inputs>> {
    let path = config.state_dir.join(names::SNAPSHOT_FILE);
    match snapshot::load(&path) {
        Ok(Some(inputs)) => {
            tracing::info!(path = %path.display(), gateways = inputs.gateways.len(), "starting with the last topology");
            Some(Arc::new(inputs))
        }
        Ok(None) => None,
        Err(e) => {
            tracing::warn!(path = %path.display(), error = %e, "cannot read the last topology; waiting for the API server");
            None
        }
    }
}

/// The reconcile loop.
struct Loop<S> {
    reconciler: Reconciler,
    feed: Feed,
    kernel_events: S,
    snapshot: PathBuf,
    /// What OpenYurt's Raven left is logged or removed (the flag) once, after Raven's own rule exists.
    leftovers: Option<(Links, bool)>,
    boot: Boot,
    reports: watch::Sender<observe::Latest>,
    plans: watch::Sender<Arc<ProxyPlan>>,
}

impl<S: futures::Stream<Item = ()> + Unpin> Loop<S> {
    async fn run(mut self) {
        let mut log = ComplaintLog::default();
        // Most runs have no new inputs, so the topology is kept between runs.
        let mut current: Option<Current> = None;
        for run in 1_u64.. {
            let inputs = self.feed.take();
            let new_topology = inputs.is_some();
            if let Some(inputs) = inputs {
                current = Some(Current { topology: build(&inputs), inputs, saved: false });
            }
            let mut rerun_after = None;
            if let Some(current) = &mut current {
                self.save(current);
                let span = tracing::info_span!("reconcile", run);
                let report = self.reconcile(&current.topology, new_topology).instrument(span).await;
                rerun_after = report.rerun_after;
                // Without an uplink, a plan does not know the node's LAN.
                if report.fails_closed || report.plan.role == Role::None {
                    let written = self.boot.update(&report.plan.state.barriers);
                    written.unwrap_or_else(|e| tracing::warn!(error = %e, "cannot update the boot unit"));
                }
                log.write(&report);
                let fails_closed = report.fails_closed;
                self.reports.send_replace(Some((report, self.reconciler.tunnel())));
                if let Some((links, remove)) = self.leftovers.take_if(|_| fails_closed) {
                    leftovers::report_or_remove(&links, remove).await;
                }
            }
            tokio::select! {
                () = self.feed.changed() => {}
                Some(()) = self.kernel_events.next() => {}
                () = sleep(rerun_after.unwrap_or(RESYNC)) => {}
            }
            // Bursts of events, and the events of this run's own steps, cause one run.
            sleep(SETTLE).await;
            while let Some(Some(())) = futures::FutureExt::now_or_never(self.kernel_events.next()) {}
        }
    }

    async fn reconcile(&mut self, topology: &Topology, new_topology: bool) -> Arc<Report> {
        let observed = self.reconciler.observe(topology).await;
        let plan = Arc::new(plan(topology, &observed.me));
        self.plans.send_if_modified(|have| {
            let changed = *have != plan.proxy;
            if changed {
                *have = plan.proxy.clone();
            }
            changed
        });
        self.reconciler.apply(plan, observed, new_topology).await
    }

    /// Writes the snapshot if the file is missing or outdated. After a failure, every run tries again.
    fn save(&self, current: &mut Current) {
        if current.saved && self.snapshot.exists() {
            return;
        }
        match snapshot::save(&self.snapshot, &current.inputs) {
            Ok(()) => current.saved = true,
            Err(e) => {
                let path = self.snapshot.display();
                tracing::warn!(%path, error = %e, "cannot write the topology; a boot without the API server would use an older one");
            }
        }
    }
}

/// The latest inputs, each taken once.
///
/// Waiting for a change of a `watch` channel marks it as seen, so `has_changed` is false afterwards. The change is
/// therefore stored here until it is taken.
struct Feed {
    inputs: watch::Receiver<Option<Arc<Inputs>>>,
    changed: bool,
}

impl Feed {
    fn new(inputs: watch::Receiver<Option<Arc<Inputs>>>) -> Self {
        Self { inputs, changed: true }
    }

    /// Inputs that have not been taken yet.
    fn take(&mut self) -> Option<Arc<Inputs>> {
        std::mem::take(&mut self.changed).then(|| self.inputs.borrow_and_update().clone()).flatten()
    }

    /// Waits for new inputs; forever if there is no watch.
    async fn changed(&mut self) {
        match self.inputs.changed().await {
            Ok(()) => self.changed = true,
            Err(_) => std::future::pending().await,
        }
    }
}

/// The latest inputs and their topology.
struct Current {
    inputs: Arc<Inputs>,
    topology: Topology,
    /// The snapshot on disk has these inputs.
    saved: bool,
}

/// Logs each complaint once, until it is resolved.
#[derive(Default)]
struct ComplaintLog {
    logged: Vec<String>,
}

impl ComplaintLog {
    fn write(&mut self, report: &Report) {
        let complaints: Vec<String> = report.complaints().collect();
        for problem in complaints.iter().filter(|c| !self.logged.contains(c)) {
            tracing::warn!(problem, "found a problem on this node");
        }
        if complaints.is_empty() && !self.logged.is_empty() {
            tracing::info!("all reported problems are resolved");
        }
        self.logged = complaints;
        if report.change.any() {
            tracing::info!(
                changes = report.change.0,
                role = report.plan.role.as_str(),
                gateway = report.plan.pool,
                tier = report.tier,
                tier_reason = report.tier_reason,
                wireguard = report.backend.map(tunnel::Backend::as_str),
                prefixes = report.plan.state.remote.len(),
                peers = report.plan.state.peers.len(),
                "applied changes"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn inputs_are_taken_once() {
        let (sender, receiver) = watch::channel(None);
        let mut feed = Feed::new(receiver);
        assert_eq!(feed.take(), None, "no inputs exist yet");
        let inputs =
            Inputs { gateways: vec![raven_api::Gateway::new("cloud", Default::default())], ..Inputs::default() };
        let inputs = Arc::new(inputs);
        sender.send_replace(Some(inputs.clone()));
        feed.changed().await;
        assert_eq!(feed.take(), Some(inputs));
        assert_eq!(feed.take(), None, "taken already");
    }
}
