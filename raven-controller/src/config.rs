//! Command line and environment, validated once.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use hyper::Uri;
use ipnet::IpNet;
use jiff::SignedDuration;

/// Elect gateway nodes, assign nodes and prefixes to pools, and report the state in each Gateway's status.
#[derive(Parser, Clone, Debug)]
#[command(name = "raven-controller", version)]
pub struct Config {
    /// Read this kubeconfig file [default: $KUBECONFIG, ~/.kube/config, or the Pod's service account].
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Use the Lease and Raven's ConfigMaps, Secrets and Services in this namespace.
    #[arg(long, env = "POD_NAMESPACE", default_value = raven_api::DEFAULT_NAMESPACE)]
    pub namespace: String,
    /// Elect the leader among the replicas by this Lease.
    #[arg(long, default_value = "raven-controller")]
    pub lease_name: String,
    /// Identify this replica in the Lease [default: host name and process ID].
    #[arg(long, env = "POD_NAME")]
    pub identity: Option<String>,
    /// Serve /healthz and /readyz at this address; `:PORT` means all addresses.
    #[arg(long, default_value = raven_api::names::DEFAULT_HEALTH_PROBE_ADDR, value_parser = parse_listen)]
    pub health_probe_addr: SocketAddr,
    /// Create Gateways by the three pool rules for nodes that no Gateway claims.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub auto_gateways: bool,
    /// Replace a gateway node whose agent's Pod is not Ready for this long, if another candidate has a Ready one.
    #[arg(long, default_value = "2m", value_parser = parse_duration, value_name = "DURATION")]
    pub agent_timeout: Duration,
    /// Protect these ranges of Service addresses, in addition to ServiceCIDR objects (Kubernetes 1.33 and later);
    /// repeatable or comma-separated.
    #[arg(long, value_name = "PREFIX", value_delimiter = ',')]
    pub service_cidr: Vec<IpNet>,
    /// Serve the conversion webhook for Gateways of v1alpha1 at this address; `:PORT` means all addresses,
    /// `off` disables it.
    #[arg(long, default_value = ":9443", value_parser = parse_listen_or_off, value_name = "ADDRESS")]
    pub webhook_bind_addr: Listen,
    /// Name the webhook's Service, and the Secret with its certificate, in the controller's namespace.
    #[arg(long, default_value = raven_api::schema::WEBHOOK_SERVICE, value_name = "NAME")]
    pub webhook_service: String,
    /// Let the API server reach the webhook at this URL instead of the Service: https://HOST:PORT without a path.
    #[arg(long, value_name = "URL", value_parser = parse_webhook_url)]
    pub webhook_url: Option<Uri>,
    /// Select the format of log lines; $RUST_LOG selects the levels [default level: info].
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// Address to listen on, or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Listen on this address.
    At(SocketAddr),
    /// Do not listen.
    Off,
}

/// Format of log lines.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text for reading.
    Text,
    /// One JSON object per line.
    Json,
}

impl Config {
    /// Returns the name of this replica, which is unique even if two replicas run on one host.
    pub fn identity(&self) -> String {
        self.identity.clone().unwrap_or_else(|| {
            let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            let host = if host.trim().is_empty() { "raven-controller" } else { host.trim() };
            format!("{host}_{}", std::process::id())
        })
    }
}

// Accepts `:10275` as Go programs do. An IPv6 socket on [::] accepts IPv4 as well.
fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let full = if text.starts_with(':') { format!("[::]{text}") } else { text.to_owned() };
    full.parse().map_err(|e| format!("{e}: expected ADDRESS:PORT or :PORT"))
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let duration: SignedDuration = text.parse().map_err(|e| format!("{e}: expected a duration such as 90s or 2m"))?;
    Duration::try_from(duration).map_err(|_| "a duration cannot be negative".to_owned())
}

fn parse_listen_or_off(text: &str) -> Result<Listen, String> {
    if text == "off" { Ok(Listen::Off) } else { parse_listen(text).map(Listen::At) }
}

fn parse_webhook_url(text: &str) -> Result<Uri, String> {
    let url: Uri = text.trim_end_matches('/').parse().map_err(|e| format!("{e}"))?;
    let plain = url.scheme_str() == Some("https") && url.host().is_some() && url.path() == "/" && url.query().is_none();
    if plain { Ok(url) } else { Err("expected https://HOST:PORT, without a path".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_address_without_a_host_means_all_addresses() {
        assert_eq!(parse_listen(":10275").map(|a| a.to_string()), Ok("[::]:10275".to_owned()));
        assert_eq!(parse_listen("127.0.0.1:0").map(|a| a.to_string()), Ok("127.0.0.1:0".to_owned()));
        assert!(parse_listen("10275").is_err());
    }

    #[test]
    fn webhook_has_an_address_and_a_valid_url_or_is_off() {
        let parse =
            |args: &[&str]| Config::try_parse_from([&["raven-controller"], args].concat()).map_err(|e| e.to_string());
        assert_eq!(parse(&["--webhook-bind-addr=off"]).map(|c| c.webhook_bind_addr), Ok(Listen::Off));
        let url = |text: &str| parse(&[&format!("--webhook-url={text}")]).map(|c| c.webhook_url.map(|u| u.to_string()));
        assert_eq!(url("https://10.0.0.5:9443"), Ok(Some("https://10.0.0.5:9443/".to_owned())));
        for bad in ["http://10.0.0.5:9443", "https://10.0.0.5:9443/convert", "10.0.0.5:9443"] {
            assert!(url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn agent_timeout_is_a_duration_and_has_a_default() {
        let parse =
            |args: &[&str]| Config::try_parse_from([&["raven-controller"], args].concat()).map(|c| c.agent_timeout);
        assert_eq!(parse(&[]).ok(), Some(crate::gateway::agents::TIMEOUT));
        assert_eq!(parse(&["--agent-timeout=90s"]).ok(), Some(Duration::from_secs(90)));
        for bad in ["--agent-timeout=90", "--agent-timeout=-5s", "--agent-timeout=soon"] {
            assert!(parse(&[bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn pool_rules_can_be_turned_off() {
        let config =
            Config::try_parse_from(["raven-controller", "--auto-gateways=false"]).expect("a valid command line");
        assert!(!config.auto_gateways);
        assert!(Config::try_parse_from(["raven-controller"]).expect("all have defaults").auto_gateways);
    }
}
