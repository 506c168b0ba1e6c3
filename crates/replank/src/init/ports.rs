//! `ports` of a service: what the proxy is to publish.

use std::net::{IpAddr, Ipv4Addr};

use replank_adapters::platform::docker::proxy_api::Protocol;

use super::plan::Port;
use super::reading::{Reading, is_extension};
use super::yaml::{Node, Value};

/// Ports whose protocols are not HTTP, or HTTP inside of the container's own TLS: their bytes are passed on as they are.
const NOT_HTTP: [u16; 26] = [
    21, 22, 25, 53, 110, 143, 389, 443, 465, 587, 636, 993, 995, 1883, 3306, 4222, 5222, 5432, 5672, 6379, 8443, 8883,
    9092, 11211, 25565, 27017,
];

pub fn read(reading: &Reading<'_>, node: &Node, key: &str) -> Vec<Port> {
    let Value::List(items) = &node.value else {
        if !node.is_nothing() {
            reading.refuse(
                node.line,
                key,
                "this is not a list",
                "write each port on a line of its own, such as - \"80:8080\"",
            );
        }
        return Vec::new();
    };
    let one = |item: &Node| match &item.value {
        Value::Map(_) => long(reading, item, key),
        Value::Null | Value::Truth(_) | Value::Whole(_) | Value::Real(_) | Value::Text(_) | Value::List(_) => {
            reading.text(item, key).and_then(|text| short(reading, &text, item.line, key))
        }
    };
    items.iter().filter_map(one).collect()
}

fn short(reading: &Reading<'_>, text: &str, line: u64, key: &str) -> Option<Port> {
    let refuse = |what: &str, advice: &str| {
        reading.refuse(line, key, format!("{text:?} {what}"), advice);
        None
    };
    let (rest, protocol) = text.rsplit_once('/').unwrap_or((text, "tcp"));
    if protocol != "tcp" {
        return refuse("is not TCP", "the proxy carries TCP and HTTP only: leave this service to compose");
    }
    let Some((outside, port)) = rest.rsplit_once(':') else {
        return refuse(
            "has no port of the host",
            "write it as \"HOST:CONTAINER\": the proxy cannot publish a port that changes",
        );
    };
    let (bind, publish) = match outside.rsplit_once(':') {
        Some((bind, publish)) => (bind.trim_start_matches('[').trim_end_matches(']'), publish),
        None => ("0.0.0.0", outside),
    };
    if publish.contains('-') || port.contains('-') {
        return refuse("is a range", "write each port on a line of its own");
    }
    let (Ok(bind), Ok(publish), Ok(port)) = (bind.parse::<IpAddr>(), publish.parse::<u16>(), port.parse::<u16>())
    else {
        return refuse("is not a port", "write it as \"80:8080\" or \"127.0.0.1:80:8080\"");
    };
    made(reading, bind, publish, port, None, line, key)
}

fn long(reading: &Reading<'_>, item: &Node, key: &str) -> Option<Port> {
    let (mut bind, mut publish, mut port, mut http) = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), None, None, None);
    for (name, node) in item.entries() {
        let at = format!("{key}.{name}");
        match name.as_str() {
            "target" => port = reading.number(node, &at),
            "published" => publish = reading.number(node, &at),
            "host_ip" => match reading.text(node, &at)?.parse() {
                Ok(address) => bind = address,
                Err(_) => reading.refuse(node.line, at, "this is not an address", "write an IP address"),
            },
            "protocol" if reading.text(node, &at)? == "tcp" => {}
            "protocol" => reading.refuse(node.line, at, "only TCP can be published", "leave this service to compose"),
            "app_protocol" => http = Some(reading.text(node, &at)?.starts_with("http")),
            // Where a swarm would answer; on one machine both are the same.
            "mode" | "name" => {}
            other if is_extension(other) => {}
            _ => reading.unknown(node.line, at),
        }
    }
    let (Some(publish), Some(port)) = (publish, port) else {
        reading.refuse(
            item.line,
            key,
            "a port has no `target` and `published`",
            "give both: the proxy cannot publish a port that changes",
        );
        return None;
    };
    let (Ok(publish), Ok(port)) = (u16::try_from(publish), u16::try_from(port)) else {
        reading.refuse(item.line, key, "this is no port", "give a number from 1 to 65535");
        return None;
    };
    made(reading, bind, publish, port, http, item.line, key)
}

fn made(
    reading: &Reading<'_>,
    bind: IpAddr,
    publish: u16,
    port: u16,
    http: Option<bool>,
    line: u64,
    key: &str,
) -> Option<Port> {
    if publish == 0 || port == 0 {
        reading.refuse(line, key, "port 0 is no port", "give a number from 1 to 65535");
        return None;
    }
    let is_http = http.unwrap_or(!NOT_HTTP.contains(&port));
    Some(Port { bind, publish, port, protocol: if is_http { Protocol::Http } else { Protocol::Tcp } })
}
