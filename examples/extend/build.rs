//! Makes the program find the libtorch that it is linked with.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if let Some(libtorch) = std::env::var_os("LIBTORCH") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}/lib", std::path::Path::new(&libtorch).display());
    }
}
