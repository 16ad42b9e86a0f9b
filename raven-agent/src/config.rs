//! What a person sets: flags and environment → [`Config`], every default resolved.

use std::{net::IpAddr, net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

/// Raven's agent: one per node.
#[derive(Parser, Debug)]
#[command(name = "raven-agent", version, about, long_about = None)]
pub struct Cli {
    /// What to do; nothing: run.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Settings of a run.
    #[command(flatten)]
    pub run: Run,
}

/// Other things than running.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Remove everything that the agent left on this node: devices, routes, rules, programs, maps, state.
    Cleanup {
        /// Keep key and last topology, for an agent that comes back.
        #[arg(long)]
        keep_state: bool,
    },
    /// The embedded WireGuard engine (started by the agent itself).
    #[command(name = crate::tunnel::engine::SUBCOMMAND, hide = true)]
    Engine {
        /// Name of the TUN device.
        device: String,
    },
}

/// How to attach TC programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TcAttach {
    /// TCX where the kernel has it (6.6), clsact below.
    Auto,
    /// TCX.
    Tcx,
    /// clsact.
    Clsact,
}

/// How a gateway node takes overlay packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tier {
    /// XDP where the uplink's driver has it natively, else TC.
    Auto,
    /// TC on `raven0` alone, also where XDP could be had.
    Tc,
}

/// Settings of a run.
#[derive(Args, Debug, Clone)]
pub struct Run {
    /// Name of this node in Kubernetes.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub node_name: String,
    /// Address of this node, where its Node object's InternalIP is not on one of its devices.
    #[arg(long, env = "NODE_IP")]
    pub node_ip: Option<IpAddr>,
    /// Kubeconfig; left out: the pod's service account.
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of the ConfigMaps raven-cfg and raven-agent-config.
    #[arg(long, env = "POD_NAMESPACE", default_value = raven_api::DEFAULT_NAMESPACE)]
    pub namespace: String,
    /// Run from the topology on disk alone, without an API server.
    #[arg(long)]
    pub offline: bool,
    /// Folder for key and last topology.
    #[arg(long, default_value = crate::names::STATE_DIR)]
    pub state_dir: PathBuf,
    /// File with a preshared key for all tunnels of the cluster, as `wg genpsk` makes it (any other text is hashed); without it there is none. It may change at
    /// any time.
    #[arg(long, default_value = crate::names::PRESHARED_KEY_FILE)]
    pub preshared_key_file: PathBuf,
    /// The same where there is no such file, as upstream's DaemonSet has it: in the environment only, which not everybody may read.
    #[arg(long, env = "VPN_CONNECTION_PSK", hide = true, hide_env_values = true)]
    pub preshared_key: Option<String>,
    /// Prefix that must never be sent into the tunnel, whatever a Gateway says (the Service range, say). Repeatable.
    #[arg(long = "protected-cidr")]
    pub protected: Vec<IpNet>,
    /// Address of the metrics server.
    #[arg(long, env = "METRIC_BIND_ADDR", default_value = ":10265", value_parser = listen_address)]
    pub metric_bind_addr: SocketAddr,
    /// Address of /healthz and /readyz.
    #[arg(long, default_value = ":10275", value_parser = listen_address)]
    pub health_probe_addr: SocketAddr,
    /// Where a cloud gateway node takes requests over TLS to kubelets; other TLS ports are beside it.
    #[arg(long, env = "PROXY_INTERNAL_SECURE_ADDR", default_value = ":10263", value_parser = listen_address)]
    pub proxy_internal_secure_addr: SocketAddr,
    /// Where a cloud gateway node takes requests in plain HTTP.
    #[arg(long, env = "PROXY_INTERNAL_INSECURE_ADDR", default_value = ":10264", value_parser = listen_address)]
    pub proxy_internal_insecure_addr: SocketAddr,
    /// How to attach TC programs.
    #[arg(long, value_enum, default_value = "auto")]
    pub tc_attach: TcAttach,
    /// How a gateway node takes overlay packets.
    #[arg(long, value_enum, default_value = "auto")]
    pub tier: Tier,
    /// File with an eBPF object to load in place of the built-in one: of `cargo xtask build-ebpf --trace`, say. Programs are replaced under
    /// traffic; the next run without this flag takes the built-in ones again.
    #[arg(long)]
    pub ebpf_object: Option<PathBuf>,
    /// Log as `text` or `json`; the level is RUST_LOG's.
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// Flags of upstream's agent that mean nothing here.
    #[command(flatten)]
    pub upstream: Upstream,
}

/// How to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// Accepted so that a cluster switches by swapping images.
#[derive(Args, Debug, Clone, Default)]
pub struct Upstream {
    #[arg(long, hide = true)]
    vpn_driver: Option<String>,
    #[arg(long, hide = true)]
    vpn_bind_port: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    forward_node_ip: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    nat_traversal: Option<String>,
    #[arg(long, hide = true)]
    keep_alive_interval: Option<String>,
    #[arg(long, hide = true)]
    keep_alive_timeout: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    sync_raven_rules: Option<String>,
    #[arg(long, hide = true)]
    sync_raven_rules_period: Option<String>,
    #[arg(long, hide = true)]
    proxy_metric_bind_addr: Option<String>,
    #[arg(long, hide = true)]
    proxy_external_addr: Option<String>,
    #[arg(long, hide = true)]
    server_cert_dns_names: Option<String>,
    #[arg(long, hide = true)]
    server_cert_ips: Option<String>,
}

impl Upstream {
    /// One warning per flag that was given.
    pub fn warnings(&self) -> Vec<String> {
        let routes = "routes and rules are watched all the time and put back at once";
        let driver = (self.vpn_driver.as_deref() != Some("wireguard")).then_some(self.vpn_driver.as_ref()).flatten();
        let names = "the proxy's certificate is for the addresses of the Gateway's status";
        let given = [
            ("vpn-driver", driver, "the tunnel is WireGuard"),
            ("vpn-bind-port", self.vpn_bind_port.as_ref(), "the port is the Gateway's spec.endpoints[].port"),
            ("forward-node-ip", self.forward_node_ip.as_ref(), "all agents must agree: set it in ConfigMap raven-agent-config"),
            ("nat-traversal", self.nat_traversal.as_ref(), "two edge sites talk through the cloud gateway in this version"),
            ("keep-alive-interval", self.keep_alive_interval.as_ref(), "WireGuard's keepalive is 15 s"),
            ("keep-alive-timeout", self.keep_alive_timeout.as_ref(), "WireGuard has its own timers"),
            ("sync-raven-rules", self.sync_raven_rules.as_ref(), routes),
            ("sync-raven-rules-period", self.sync_raven_rules_period.as_ref(), routes),
            ("proxy-metric-bind-addr", self.proxy_metric_bind_addr.as_ref(), "the proxy's metrics are those of --metric-bind-addr"),
            ("proxy-external-addr", self.proxy_external_addr.as_ref(), "the port is the Gateway's spec.endpoints[].port"),
            ("server-cert-dns-names", self.server_cert_dns_names.as_ref(), names),
            ("server-cert-ips", self.server_cert_ips.as_ref(), names),
        ];
        given
            .iter()
            .filter(|(_, value, _)| value.is_some())
            .map(|(flag, _, why)| format!("--{flag} is accepted and has no effect: {why}"))
            .collect()
    }
}

/// `:10265` as Go has it: all addresses, of both families.
fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let full = if text.starts_with(':') { format!("[::]{text}") } else { text.to_owned() };
    full.parse().map_err(|_| format!("{text:?} is not of the form ADDRESS:PORT or :PORT"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_of_upstream_are_accepted_and_said_to_mean_nothing() {
        let cli = Cli::try_parse_from(["raven-agent", "--vpn-driver=libreswan", "--forward-node-ip", "--metric-bind-addr", ":10265"]);
        let warnings = cli.expect("accepted").run.upstream.warnings();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        let cli = Cli::try_parse_from(["raven-agent", "--vpn-driver=wireguard"]);
        assert_eq!(cli.expect("accepted").run.upstream.warnings(), Vec::<String>::new());
    }
}
