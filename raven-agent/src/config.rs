//! Command line and environment, with all defaults resolved.

use std::{net::IpAddr, net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

/// Connect this node to the nodes of other pools.
#[derive(Parser, Debug)]
#[command(name = "raven-agent", version, about, long_about = None)]
pub struct Cli {
    /// A subcommand; without one, run the agent.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Settings of the agent.
    #[command(flatten)]
    pub run: Run,
}

/// Subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Remove everything Raven installed on this node: devices, routes, rules, programs, maps and state.
    Cleanup {
        /// Keep the WireGuard key, the last topology and the proxy's certificates.
        #[arg(long)]
        keep_state: bool,
        /// After a cleanup without errors, repeat it every ten seconds until SIGTERM, as the program of a Pod.
        #[arg(long)]
        stay: bool,
    },
    /// Run the userspace WireGuard engine until SIGTERM; on a node whose kernel has WireGuard, only wait.
    Wireguard {
        /// Do not run an engine, but fail if the running one does not respond.
        #[arg(long)]
        check: bool,
    },
    /// Run the embedded WireGuard engine (started by the agent).
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
    /// Always TCX.
    Tcx,
    /// Always clsact.
    Clsact,
}

/// Which process runs WireGuard on a node whose kernel has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// A child process of the agent. In a container, it ends with the agent's.
    Embedded,
    /// `raven-agent wireguard`, in a Pod of its own.
    External,
}

/// How a gateway node receives overlay packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tier {
    /// XDP where the uplink's driver supports it natively, else TC.
    Auto,
    /// TC on `raven0` only.
    Tc,
}

/// Settings of the agent.
#[derive(Args, Debug, Clone)]
pub struct Run {
    /// Act as this node of the cluster (required).
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub node_name: String,
    /// Find the uplink by this address, if the InternalIP of the Node is on none of its devices.
    #[arg(long, env = "NODE_IP")]
    pub node_ip: Option<IpAddr>,
    /// Read this kubeconfig file [default: the Pod's service account].
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Read ConfigMaps raven-cfg and raven-agent-config from this namespace.
    #[arg(long, env = "POD_NAMESPACE", default_value = raven_api::DEFAULT_NAMESPACE)]
    pub namespace: String,
    /// Run from the topology on disk, without an API server.
    #[arg(long)]
    pub offline: bool,
    /// Store the WireGuard key, the last topology and the proxy's certificates in this folder.
    #[arg(long, default_value = crate::names::STATE_DIR)]
    pub state_dir: PathBuf,
    /// Read the preshared key of all tunnels from this file, in the format of `wg genpsk`; any other text is hashed.
    /// The file may change at any time.
    #[arg(long, default_value = crate::names::PRESHARED_KEY_FILE)]
    pub preshared_key_file: PathBuf,
    /// Preshared key if the file does not exist, as in upstream's DaemonSet. Only from the environment, which other
    /// users cannot read
    #[arg(long, env = "VPN_CONNECTION_PSK", hide = true, hide_env_values = true)]
    pub preshared_key: Option<String>,
    /// Keep this prefix outside the tunnel, whatever a Gateway claims, such as the Service range; repeatable.
    #[arg(long = "protected-cidr")]
    pub protected: Vec<IpNet>,
    /// Serve /metrics, /status, /drops and /connections at this address; `:PORT` means all addresses.
    #[arg(long, env = "METRIC_BIND_ADDR", default_value = ":10265", value_parser = listen_address)]
    pub metric_bind_addr: SocketAddr,
    /// Serve the metrics address with TLS, and only with a bearer token whose owner may `get` the path
    /// (deploy/metrics-secure). On the node itself, plain requests to the loopback address are still answered.
    #[arg(long)]
    pub metrics_secure: bool,
    /// Use the certificate tls.crt and the key tls.key in this folder, which may change at any time [default: a
    /// self-signed certificate].
    #[arg(long, requires = "metrics_secure", value_name = "DIR")]
    pub metrics_cert_dir: Option<PathBuf>,
    /// Serve /healthz and /readyz at this address; `:PORT` means all addresses.
    #[arg(long, default_value = raven_api::names::DEFAULT_HEALTH_PROBE_ADDR, value_parser = listen_address)]
    pub health_probe_addr: SocketAddr,
    /// Accept TLS requests to kubelets at this address (cloud gateway nodes); `:PORT` means the node's
    /// InternalIP. Further TLS ports have their own listeners.
    #[arg(long, env = "PROXY_INTERNAL_SECURE_ADDR", default_value = ":10263", value_parser = listen_address)]
    pub proxy_internal_secure_addr: SocketAddr,
    /// Accept plain HTTP requests at this address (cloud gateway nodes); `:PORT` means the node's InternalIP.
    #[arg(long, env = "PROXY_INTERNAL_INSECURE_ADDR", default_value = ":10264", value_parser = listen_address)]
    pub proxy_internal_insecure_addr: SocketAddr,
    /// Check an idle proxy connection at this interval, in seconds (edge gateway nodes). A dead link is noticed after this
    /// time, or within five seconds while a stream is open. The default costs a site about 30 MB a month.
    #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u16).range(5..=3600))]
    pub proxy_keepalive: u16,
    /// Ping the other end's process on an idle proxy connection at this interval, in seconds (edge gateway nodes). Behind a
    /// TCP load balancer that answers keepalives itself, only these pings detect a dead cloud node, and keep the balancer
    /// from closing idle connections.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u16).range(5..=3600))]
    pub proxy_ping: u16,
    /// End proxy streams after this time without an acknowledgement, in seconds. New streams use another connection before
    /// that.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u16).range(5..=3600))]
    pub proxy_stream_timeout: u16,
    /// Leave packets with this bit of the mark to kube-proxy, which masquerades them: its `--iptables-masquerade-bit`.
    #[arg(long, env = "MASQUERADE_BIT", default_value_t = 14, value_parser = clap::value_parser!(u8).range(0..32))]
    pub masquerade_bit: u8,
    /// Limit the tunnel's MTU to this many bytes, without WireGuard's headers, if a link of the site has a smaller MTU than
    /// the uplink [default: the MTU of the uplink less 80, which is also the maximum].
    #[arg(long, value_name = "BYTES", overrides_with = "tunnel_mtu", value_parser = clap::value_parser!(u32).range(1280..=65_535))]
    pub tunnel_mtu: Option<u32>,
    /// Install a systemd unit in this folder of the host: after a boot, it refuses packets for other pools until the agent
    /// runs.
    #[arg(long)]
    pub boot_unit_dir: Option<PathBuf>,
    /// Remove the rules, chains and ipsets that OpenYurt's Raven left on this node. Without this flag they are only logged.
    #[arg(long)]
    pub adopt: bool,
    /// Attach TC programs by this mechanism.
    #[arg(long, value_enum, default_value = "auto")]
    pub tc_attach: TcAttach,
    /// Receive overlay packets in this tier on a gateway node.
    #[arg(long, value_enum, default_value = "auto")]
    pub tier: Tier,
    /// Run WireGuard by this process on a node whose kernel has none.
    #[arg(long, env = "WIREGUARD_ENGINE", value_enum, default_value = "embedded")]
    pub wireguard_engine: Engine,
    /// Load this eBPF object instead of the built-in one, such as that of `cargo xtask build-ebpf --trace`. Programs are
    /// replaced under traffic; a start without this flag restores the built-in ones.
    #[arg(long)]
    pub ebpf_object: Option<PathBuf>,
    /// Log in this format. RUST_LOG sets the level.
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// Flags of upstream's agent that have no effect
    #[command(flatten)]
    pub upstream: Upstream,
}

/// Format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// Flags of upstream's agent, accepted so that a cluster can switch by replacing the image.
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
    /// One warning per flag that is set.
    pub fn warnings(&self) -> Vec<String> {
        let routes = "routes and rules are watched and restored at once";
        let driver = (self.vpn_driver.as_deref() != Some("wireguard")).then_some(self.vpn_driver.as_ref()).flatten();
        let names = "the proxy's certificate is issued for the addresses in the Gateway's status";
        let given = [
            ("vpn-driver", driver, "the tunnel is WireGuard"),
            ("vpn-bind-port", self.vpn_bind_port.as_ref(), "the port is the Gateway's spec.endpoints[].port"),
            (
                "forward-node-ip",
                self.forward_node_ip.as_ref(),
                "all agents must use the same value; set it in ConfigMap raven-agent-config",
            ),
            (
                "nat-traversal",
                self.nat_traversal.as_ref(),
                "packets between two edge sites are relayed by a cloud gateway",
            ),
            ("keep-alive-interval", self.keep_alive_interval.as_ref(), "WireGuard's keepalive is 15 s"),
            ("keep-alive-timeout", self.keep_alive_timeout.as_ref(), "WireGuard has its own timers"),
            ("sync-raven-rules", self.sync_raven_rules.as_ref(), routes),
            ("sync-raven-rules-period", self.sync_raven_rules_period.as_ref(), routes),
            (
                "proxy-metric-bind-addr",
                self.proxy_metric_bind_addr.as_ref(),
                "--metric-bind-addr also serves the proxy's metrics",
            ),
            (
                "proxy-external-addr",
                self.proxy_external_addr.as_ref(),
                "the port is the Gateway's spec.endpoints[].port",
            ),
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

/// Parses an address; `:10265`, as in Go, means all addresses of both families.
fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let full = if text.starts_with(':') { format!("[::]{text}") } else { text.to_owned() };
    full.parse().map_err(|_| format!("{text:?} does not have the form ADDRESS:PORT or :PORT"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn upstream_flags_are_accepted_with_a_warning() {
        let cli = Cli::try_parse_from([
            "raven-agent",
            "--vpn-driver=libreswan",
            "--forward-node-ip",
            "--metric-bind-addr",
            ":10265",
        ]);
        let warnings = cli.expect("accepted").run.upstream.warnings();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        let cli = Cli::try_parse_from(["raven-agent", "--vpn-driver=wireguard"]);
        assert_eq!(cli.expect("accepted").run.upstream.warnings(), Vec::<String>::new());
    }
}
