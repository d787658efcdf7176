marlinq_add_cpu_isa(NAME generic)
